"""The catalogue on disk, and what a running coordinator makes of its changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from azu.config import RemoveSettings
from azu.distribution import Library
from azu.errors import CapacityError, InputError
from azu.identity import Identity
from azu.models.manifest import Blob, LayerCache, Manifest
from coordinator.catalogue import MAX_MODELS, Catalogue, Listed
from coordinator.catalogue_commands import remove
from coordinator.serving import Serving

PATIENCE_S = 30.0


def digest(number: int) -> str:
    return f"{number:064x}"


class Published:
    """A data folder with small signed models, of files that really are there."""

    def __init__(self, folder: Path) -> None:
        self.library = Library(folder)
        self.catalogue = Catalogue(folder)
        self.serving = Serving(self.library, self.catalogue)

    def add(
        self, model_id: str, revision: str, layers: tuple[bytes, ...], *, config: bytes = b"{}", listed: bool = True
    ) -> Manifest:
        store = self.library.store
        blobs = tuple(store.put_bytes(layer) for layer in layers)
        manifest = Manifest(
            model_id=model_id, revision=revision, origin="", architecture="LlamaForCausalLM", dtype="float32",
            n_layers=len(blobs), hidden_size=8, vocab_size=8, context_length=8, config=store.put_bytes(config),
            tokenizer={"tokenizer.json": store.put_bytes(b"[]")}, layers=blobs,
            caches=(LayerCache(8),) * len(blobs), shared={}, sources={}, tied=True,
        )  # fmt: skip
        self.library.publish(Identity(bytes(32)), manifest)
        if listed:
            self.catalogue.add(Listed(model_id, manifest.digest))
        return manifest

    def has(self, blob: Blob) -> bool:
        return self.library.store.has(blob.digest)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path)


def test_what_is_listed_is_replaced_and_removed(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    assert catalogue.models() == ()
    first, second = Listed("a/b", digest(1)), Listed("c", digest(2))
    catalogue.add(first)
    catalogue.add(second)
    stamp = catalogue.stamp()
    catalogue.add(second)
    assert catalogue.models() == (first, second)
    assert catalogue.stamp() != stamp
    newer = Listed("a/b", digest(3))
    catalogue.add(newer)
    assert Catalogue(tmp_path).models() == (newer, second)
    assert catalogue.remove("a/b") == newer
    assert catalogue.models() == (second,)
    with pytest.raises(InputError, match="Listed are: c"):
        catalogue.remove("a/b")


def test_it_holds_no_more_than_a_record_names(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    for number in range(MAX_MODELS):
        catalogue.check_room(f"m{number}")
        catalogue.add(Listed(f"m{number}", digest(number)))
    for work in (lambda: catalogue.add(Listed("another", digest(99))), lambda: catalogue.check_room("another")):
        with pytest.raises(CapacityError) as caught:
            work()
        assert caught.value.code == "too_many_models"
    catalogue.check_room("m0")
    catalogue.add(Listed("m0", digest(99)))
    assert len(catalogue.models()) == MAX_MODELS


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"models": [{}]}', '{"models": [{"model_id": "a", "manifest": "b"}]}']
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "models.json").write_text(text)
    for work in (Catalogue(tmp_path).models, lambda: Catalogue(tmp_path).add(Listed("a", digest(1)))):
        with pytest.raises(InputError) as caught:
            work()
        assert caught.value.code == "bad_catalogue"
    assert (tmp_path / "models.json").read_text() == text


def test_changes_of_many_at_once_are_all_kept(tmp_path: Path) -> None:
    """The lock is on the open file, so that threads stand for processes."""

    def add(start: int) -> None:
        for number in range(start, start + 8):
            Catalogue(tmp_path).add(Listed(f"m{number}", digest(number)))

    threads = [threading.Thread(target=add, args=(8 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {model.model_id for model in Catalogue(tmp_path).models()} == {f"m{number}" for number in range(32)}


def test_files_that_another_model_has_too_are_kept(published: Published) -> None:
    one = published.add("one", "r", (b"common", b"pinned", b"a" * 100))
    other = published.add("other", "r", (b"common", b"b"))
    pinned = published.add("pinned", "r", (b"pinned",), listed=False)
    assert published.catalogue.free(published.library, one, [pinned]) == 0  # it is listed itself
    published.catalogue.remove("one")
    assert published.catalogue.free(published.library, one, [pinned]) == 100
    assert [published.has(blob) for blob in one.layers] == [True, True, False]
    assert all(published.has(blob) for blob in (*other.blobs(), *pinned.blobs()))


def test_what_a_killed_program_left_goes_with_the_model(published: Published, tmp_path: Path) -> None:
    older = published.add("one", "r1", (b"a", b"common"), listed=False)
    newer = published.add("one", "r2", (b"b",))
    other = published.add("other", "r1", (b"common",))
    remove(RemoveSettings(data_dir=tmp_path, model_id="one"))
    assert [published.has(layer) for layer in (*older.layers, *newer.layers)] == [False, True, False]
    assert published.catalogue.models() == (Listed("other", other.digest),)


def test_nothing_is_listed_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Listed are: none"):
        Catalogue(tmp_path / "absent").remove("one")
    assert not (tmp_path / "absent").exists()


def test_what_is_served(published: Published) -> None:
    pinned = published.add("one", "r1", (b"a",), listed=False)
    published.serving.pin(pinned)
    published.serving.refresh()
    assert published.serving.manifests() == (pinned,)
    newer = published.add("one", "r2", (b"b",))
    other = published.add("two", "r1", (b"c",))
    assert published.serving.refresh() == [pinned]
    assert published.serving.manifests() == (newer, other)
    assert published.serving.retired() == {pinned.digest}
    assert [published.serving.is_listed(each.digest) for each in (pinned, newer, other)] == [True] * 3
    (one, two) = published.serving.models()
    assert two.tokenizer_files["tokenizer.json"].read_bytes() == b"[]"
    published.catalogue.remove("one")
    assert not published.serving.is_listed(newer.digest)
    assert published.serving.refresh() == [newer]
    assert published.serving.manifests() == (pinned, other)
    assert published.serving.models()[1] is two  # what did not change is not read again
    assert one not in published.serving.models()


def test_an_incomplete_model_is_left_out(published: Published, caplog: pytest.LogCaptureFixture) -> None:
    lost = published.add("lost", "r", (b"a", b"b"))
    whole = published.add("whole", "r", (b"c",))
    published.catalogue.add(Listed("unknown", digest(1)))
    published.library.store.path(lost.layers[1].digest).unlink()
    zeroed = published.library.store.path(published.add("zeroed", "r", (b"d",), config=b'{"a": 1}').config.digest)
    zeroed.chmod(0o600)
    zeroed.write_bytes(bytes(8))  # as a power loss may leave it
    published.serving.refresh()
    assert published.serving.manifests() == (whole,)
    assert caplog.messages.count("listed model is not complete") == 3


async def test_changes_are_taken_up(published: Published, nursery: trio.Nursery) -> None:
    serving = published.serving
    nursery.start_soon(serving.follow)
    one = published.add("one", "r1", (b"a", b"common"))
    await until(lambda: serving.manifests() == (one,))
    two = published.add("two", "r1", (b"b", b"common"))
    await until(lambda: serving.manifests() == (one, two))
    changed = serving.changed
    (published.library.store.root.parent / "models.json").write_text("{")  # for a moment, say
    await trio.sleep(0.1)
    assert serving.manifests() == (one, two)
    (published.library.store.root.parent / "models.json").write_text(
        json.dumps({"models": [{"model_id": "two", "manifest": two.digest}]})
    )
    await until(lambda: serving.manifests() == (two,) and not published.has(one.layers[0]))
    assert changed.is_set()
    assert published.has(two.layers[1])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.02)
