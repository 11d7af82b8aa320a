"""Blobs appear whole or not at all, resume where they stopped, and survive two processes and full disks."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from azu.errors import CapacityError, InputError, InternalError, ModelError, TrustError
from azu.models.manifest import Blob
from azu.models.store import LayerStore

DATA = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


def leftovers(store: LayerStore) -> list[str]:
    return [path.name for path in (store.root / "partial").iterdir()]


BLOB = Blob(DIGEST, len(DATA))


def stream(store: LayerStore, data: bytes) -> None:
    with store.incoming(Blob(hashlib.sha256(data).hexdigest(), len(data)), [hashlib.sha256(data).digest()]) as incoming:
        incoming.write(0, data)
        incoming.commit()


def test_put_and_get(store: LayerStore) -> None:
    blob = store.put_bytes(DATA)
    assert (blob.digest, blob.size) == (DIGEST, len(DATA))
    assert store.has(DIGEST)
    assert store.path(DIGEST).read_bytes() == DATA
    assert store.path(DIGEST).relative_to(store.root) == Path("blobs") / DIGEST[:2] / DIGEST
    assert store.read(DIGEST, 100, 50) == DATA[100:150]
    assert store.read(DIGEST, len(DATA) - 5, 50) == DATA[-5:]
    assert store.digests() == {DIGEST}
    assert store.size(DIGEST) == len(DATA)
    assert store.verify(DIGEST)
    assert leftovers(store) == []


def test_putting_again_writes_nothing(store: LayerStore) -> None:
    store.put_bytes(DATA)
    inode = store.path(DIGEST).stat().st_ino
    store.put_chunks([DATA[:10], memoryview(DATA)[10:]])
    assert store.path(DIGEST).stat().st_ino == inode


def test_absent_blobs(store: LayerStore) -> None:
    assert not store.has(DIGEST)
    for call in (store.path, store.size, store.verify, lambda digest: store.read(digest, 0, 1)):
        with pytest.raises(ModelError) as caught:
            call(DIGEST)
        assert caught.value.code == "missing_blob"


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", DIGEST + "/x"])
def test_digests_are_checked_before_they_become_paths(store: LayerStore, digest: str) -> None:
    for call in (store.has, store.path, store.verify):
        with pytest.raises(InputError):
            call(digest)
    with pytest.raises(ModelError):
        Blob(digest, 1)


def test_negative_reads(store: LayerStore) -> None:
    store.put_bytes(DATA)
    for offset, length in ((-1, 5), (5, -1)):
        with pytest.raises(InputError):
            store.read(DIGEST, offset, length)


def test_streaming_in(store: LayerStore) -> None:
    stream(store, DATA)
    assert store.path(DIGEST).read_bytes() == DATA
    assert leftovers(store) == []
    stream(store, DATA)  # and once more over the top


def test_an_empty_blob(store: LayerStore) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    stream(store, b"")
    assert store.read(digest, 0, 10) == b""
    assert leftovers(store) == []


def test_two_writers_of_one_blob(store: LayerStore) -> None:
    digests = [hashlib.sha256(DATA).digest()]
    with store.incoming(BLOB, digests) as one, LayerStore(store.root).incoming(BLOB, digests) as two:
        for incoming in (one, two):
            incoming.write(0, DATA)
        for incoming in (one, two):
            incoming.commit()
    assert store.verify(DIGEST)
    assert leftovers(store) == []


def _fill(root: Path, failures: Any) -> None:
    try:
        store = LayerStore(root)
        for number in range(40):
            data = bytes([number]) * 5000
            stream(store, data)
            store.put_bytes(data[:4000])
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_two_processes(store: LayerStore) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    workers = [context.Process(target=_fill, args=(store.root, failures)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0], failures.get(timeout=5)
    assert len(store.digests()) == 80
    assert all(store.verify(digest) for digest in store.digests())
    assert leftovers(store) == []


def test_rot_is_deleted(store: LayerStore) -> None:
    store.put_bytes(DATA)
    store.path(DIGEST).chmod(0o644)
    store.path(DIGEST).write_bytes(b"rotten")
    assert not store.verify(DIGEST)
    assert not store.has(DIGEST)


def test_a_full_disk(store: LayerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: store.put_bytes(DATA), lambda: stream(store, DATA)):
        with pytest.raises(InternalError) as caught:
            write()
        assert caught.value.code == "storage"
        assert "space" in caught.value.remedy
        assert store.digests() == set()
    assert leftovers(store) == [DIGEST]  # what came can still be resumed
    monkeypatch.undo()
    stream(store, DATA)
    assert store.verify(DIGEST)


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InternalError):
        LayerStore(tmp_path / "file" / "store")


# --- room


def aged(store: LayerStore, count: int, size: int = 2 << 20) -> list[str]:
    """Blobs of `size` bytes, the first used longest ago."""
    digests = [store.put_bytes(bytes([number]) * size).digest for number in range(count)]
    for age, digest in enumerate(digests):
        os.utime(store.path(digest), (1_000_000 + age, 1_000_000))
    return digests


def test_room_is_made_of_what_was_not_used_for_longest(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, limit_bytes=9 << 20)
    digests = aged(store, 4)
    small = store.put_bytes(b"a config").digest
    os.utime(store.path(small), (1, 1))
    store.path(digests[1])  # a use
    assert store.make_room([]) == 0
    wanted = Blob("f" * 64, 3 << 20)
    assert store.make_room([wanted], keep={digests[0]}) == 4 << 20
    assert store.digests() == {digests[0], digests[1], small}
    assert store.make_room([wanted], keep={digests[0]}) == 0


def test_what_is_wanted_and_here_neither_counts_twice_nor_goes(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, limit_bytes=4 << 20)
    digests = aged(store, 2)
    assert store.make_room([Blob(digest, 2 << 20) for digest in digests]) == 0
    assert store.digests() == set(digests)


def test_a_limit_that_is_too_small_is_named(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, limit_bytes=4 << 20)
    aged(store, 2)
    with pytest.raises(CapacityError) as raised:
        store.make_room(
            [
                Blob(
                    "f" * 64,
                    4 << 20,
                )
            ],
            keep=store.digests(),
        )
    assert (raised.value.code, raised.value.message) == (
        "cache_limit", "the layer files would take 8.0 MiB, and the cache may take 4.0 MiB"
    )  # fmt: skip


def test_a_full_disk_is_made_room_on_too_and_else_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LayerStore(tmp_path)
    digests = aged(store, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=260 << 20))
    assert store.make_room([Blob("f" * 64, 4 << 20)]) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=258 << 20))
    assert store.make_room([Blob("f" * 64, 4 << 20)]) == 2 << 20
    assert store.digests() == set(digests[1:])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(InternalError, match="the disk is too small"):
        store.make_room([Blob("f" * 64, 4 << 20)])


def test_who_is_done_deletes_nothing_of_who_begins_anew(store: LayerStore) -> None:
    pieces = [hashlib.sha256(DATA).digest()]
    with ExitStack() as second:
        with store.incoming(BLOB, pieces) as incoming:
            incoming.write(0, DATA)
            incoming.commit()
            again = second.enter_context(store.incoming(BLOB, pieces))
        assert leftovers(store) == [DIGEST]
        again.write(0, DATA)
        again.commit()
    assert leftovers(store) == []


def test_an_unfinished_download_of_what_came_another_way_is_deleted(store: LayerStore) -> None:
    with store.incoming(BLOB, [hashlib.sha256(DATA).digest()]):
        (store.root / "partial" / DIGEST).write_bytes(DATA[:100])
        store.put_bytes(DATA)
    assert leftovers(store) == []


def test_unfinished_downloads_make_room_unless_somebody_is_at_them(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, limit_bytes=1 << 20)
    busy, left = Blob("a" * 64, 2 << 20), Blob("b" * 64, 2 << 20)
    with store.incoming(busy, [b""]):
        for blob in (busy, left):
            (tmp_path / "partial" / blob.digest).write_bytes(b"x" * (2 << 20))
        with pytest.raises(CapacityError):
            store.make_room([])
        assert leftovers(store) == [busy.digest]


def test_a_file_that_is_open_outlives_its_eviction(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, limit_bytes=1)
    digest = aged(store, 1)[0]
    with store.path(digest).open("rb") as file:
        store.make_room([])
        assert not store.has(digest)
        assert len(file.read()) == 2 << 20


# --- what a disk may have done to a file


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "zeroed": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_blob_is_found_by_the_next_process_and_deleted(store: LayerStore, damage: str) -> None:
    store.put_bytes(DATA)
    place = store.path(DIGEST)
    place.chmod(0o644)
    place.write_bytes(DAMAGES[damage](DATA))
    restarted = LayerStore(store.root)
    assert restarted.has(DIGEST), "a look at the names alone cannot tell"
    assert not restarted.check(DIGEST)
    assert not restarted.has(DIGEST)
    assert not store.check(DIGEST), "and by the one that wrote it, since the file was changed since"


def test_asking_for_what_is_not_here_takes_no_memory(store: LayerStore) -> None:
    for number in range(100):
        assert not store.check(f"{number:064x}")
    assert not store._checking


def test_a_blob_is_hashed_once_in_a_process(store: LayerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_bytes(DATA)
    restarted = LayerStore(store.root)
    hashed: list[str] = []
    verify = LayerStore.verify

    def noted(self: LayerStore, digest: str) -> bool:
        hashed.append(digest)
        return verify(self, digest)

    monkeypatch.setattr(LayerStore, "verify", noted)
    for _ in range(3):
        assert store.check(DIGEST)
        assert restarted.check(DIGEST)
        restarted.path(DIGEST)  # a use is no change
    assert hashed == [DIGEST], "what was just written need not be read, and once is enough"
    assert not store.check("0" * 64)


def test_what_has_to_be_something_is_nothing_else(store: LayerStore) -> None:
    assert store.put_chunks([DATA[:10], DATA[10:]], expected=BLOB) == BLOB
    for wrong, code in ((DATA + b"x", "size_mismatch"), (DATA[:-1] + b"x", "digest_mismatch"), (b"", "size_mismatch")):
        with pytest.raises(TrustError) as raised:
            store.put_chunks([wrong], expected=BLOB)
        assert raised.value.code == code
    assert store.digests() == {DIGEST}
    assert leftovers(store) == []


def test_crumbs_of_crashed_processes_are_swept(store: LayerStore) -> None:
    partial = store.root / "partial"
    for name in ("new.1.abc", f"{DIGEST}.abc", DIGEST, "new.2.abc"):
        (partial / name).write_bytes(b"x")
        if name != "new.2.abc":
            os.utime(partial / name, (0, 0))

    def slow() -> Iterator[bytes]:  # a disk may take its time, and whoever sends even more
        yield b"x"
        (written,) = (path for path in partial.glob("new.*") if path.name not in ("new.1.abc", "new.2.abc"))
        os.utime(written, (0, 0))
        LayerStore(store.root)
        assert sorted(leftovers(store)) == sorted([DIGEST, "new.2.abc", written.name])
        yield b"y"

    assert store.has(store.put_chunks(slow()).digest)
    assert sorted(leftovers(store)) == sorted([DIGEST, "new.2.abc"])
