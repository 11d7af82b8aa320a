"""Blobs appear whole or not at all, resume where they stopped, and survive two processes and full disks."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from azu.errors import InputError, InternalError, ModelError, TrustError
from azu.models.store import LayerStore

DATA = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


def leftovers(store: LayerStore) -> list[str]:
    return [path.name for path in (store.root / "partial").iterdir()]


def stream(store: LayerStore, data: bytes, digest: str = DIGEST, size: int = len(DATA)) -> None:
    with store.writer(digest, size) as writer:
        for start in range(writer.offset, len(data), 10_000):
            writer.write(data[start : start + 10_000])
        writer.commit()


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
    with pytest.raises(ModelError), store.writer(digest, 1):
        pass


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
    stream(store, b"", digest, 0)
    assert store.read(digest, 0, 10) == b""
    assert leftovers(store) == []


def test_resuming(store: LayerStore) -> None:
    with store.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[:70_000])  # and then the peer leaves
    assert not store.has(DIGEST)
    with LayerStore(store.root).writer(DIGEST, len(DATA)) as writer:
        assert writer.offset == 70_000
        writer.write(DATA[70_000:])
        assert writer.commit().digest == DIGEST
    assert store.verify(DIGEST)


def test_a_tampered_partial_is_found_at_the_end_and_deleted(store: LayerStore) -> None:
    with store.writer(DIGEST, len(DATA)) as writer:
        writer.write(b"x" * 100)
    with pytest.raises(TrustError) as caught:
        stream(store, DATA)
    assert caught.value.code == "digest_mismatch"
    assert not store.has(DIGEST)
    assert leftovers(store) == []
    stream(store, DATA)


def test_too_much_is_refused_while_it_streams(store: LayerStore) -> None:
    with store.writer(DIGEST, 1000) as writer:
        writer.write(DATA[:900])
        with pytest.raises(TrustError) as caught:
            writer.write(DATA[:101])
    assert caught.value.code == "size_mismatch"
    assert leftovers(store) == []


def test_too_little_is_no_blob_yet(store: LayerStore) -> None:
    with store.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[:100])
        with pytest.raises(TrustError):
            writer.commit()
    assert not store.has(DIGEST)
    stream(store, DATA)


def test_a_partial_longer_than_the_blob_starts_anew(store: LayerStore) -> None:
    (store.root / "partial" / DIGEST).write_bytes(DATA + b"more")
    stream(store, DATA)
    assert store.verify(DIGEST)


def test_two_writers_of_one_blob(store: LayerStore) -> None:
    with store.writer(DIGEST, len(DATA)) as one, LayerStore(store.root).writer(DIGEST, len(DATA)) as two:
        for start in range(0, len(DATA), 64_000):
            one.write(DATA[start : start + 64_000])
            two.write(DATA[start : start + 64_000])
        one.commit()
        two.commit()
    assert store.verify(DIGEST)
    assert leftovers(store) == []


def _fill(root: Path, failures: Any) -> None:
    try:
        store = LayerStore(root)
        for number in range(40):
            data = bytes([number]) * 5000
            stream(store, data, hashlib.sha256(data).hexdigest(), len(data))
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
    assert leftovers(store) == [DIGEST]  # what was streamed can still be resumed
    monkeypatch.undo()
    stream(store, DATA)
    assert store.verify(DIGEST)


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InternalError):
        LayerStore(tmp_path / "file" / "store")


def test_eviction_takes_the_least_recently_used(tmp_path: Path) -> None:
    store = LayerStore(tmp_path, limit_bytes=2500)
    digests = [store.put_bytes(bytes([number]) * 1000).digest for number in range(4)]
    for age, digest in enumerate(reversed(digests)):
        os.utime(store.path(digest), (1_000_000 - age, 1_000_000 - age))
    store.path(digests[1])  # a use
    assert store.evict(keep={digests[0]}) == 2000
    assert store.digests() == {digests[0], digests[1]}
    assert store.evict(keep=set()) == 0
    assert LayerStore(tmp_path).evict(keep=set()) == 0


def test_crumbs_of_crashed_processes_are_swept(store: LayerStore) -> None:
    partial = store.root / "partial"
    for name in ("new.1.abc", f"{DIGEST}.abc", DIGEST, "new.2.abc"):
        (partial / name).write_bytes(b"x")
        if name != "new.2.abc":
            os.utime(partial / name, (0, 0))
    LayerStore(store.root)
    assert sorted(leftovers(store)) == sorted([DIGEST, "new.2.abc"])
