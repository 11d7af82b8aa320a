"""The queue of models to cut: one at a time, bounded, cancelled at once, and every outcome can be asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from azu.distribution import Library
from azu.errors import CapacityError, ModelError
from azu.identity import Identity
from azu.models.manifest import Manifest
from azu.models.progress import Progress, Report, silent
from azu.models.published import is_whole
from coordinator.catalogue import MAX_MODELS, Catalogue, Listed
from coordinator.shard_screen import progress_text
from coordinator.shards import Rate, Sharder, ShardQueue, ShardStatus, hold_lock
from tests.coordinator.api.twin import served_model
from tests.loopback_hub import sharded_llama

PATIENCE_S = 30.0


class Cutter:
    """Cuts nothing, step by step as it is told; in the queue's thread."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.may_end = threading.Event()
        self.error: Exception | None = None

    def __call__(self, model_id: str, report: Report) -> Manifest:
        self.begun.append(model_id)
        try:
            while not self.may_end.wait(0.01):
                report(Progress("downloading", "model.safetensors", 50, 100))
            if self.error is not None:
                raise self.error
            return self.manifest
        finally:
            self.ended.append(model_id)


@pytest.fixture
def cutter(tmp_path: Path) -> Cutter:
    return Cutter(served_model(tmp_path).manifest)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.01)


def state(queue: ShardQueue, model_id: str) -> str:
    found = queue.status(model_id)
    return "" if found is None else found.state


async def test_one_after_another(cutter: Cutter, nursery: trio.Nursery) -> None:
    queue = ShardQueue(cutter)
    assert queue.submit("a/one") == ShardStatus("a/one", "queued")
    assert queue.submit("a/two").state == "queued"
    assert queue.status("a/three") is None
    nursery.start_soon(queue.run)
    await until(lambda: queue.submit("a/one").progress is not None)
    assert state(queue, "a/one") == "downloading"
    assert queue.submit("a/one").progress == Progress("downloading", "model.safetensors", 50, 100)
    assert (cutter.begun, state(queue, "a/two")) == (["a/one"], "queued")
    cutter.may_end.set()
    await until(lambda: state(queue, "a/two") == "ready")
    assert queue.status("a/one") == ShardStatus("a/one", "ready", manifest=cutter.manifest)
    assert cutter.begun == ["a/one", "a/two"]
    queue.submit("a/one")
    await until(lambda: len(cutter.ended) == 3)


@pytest.mark.parametrize("expected", [True, False])
async def test_a_failure_is_told_and_not_the_end(cutter: Cutter, nursery: trio.Nursery, expected: bool) -> None:
    queue = ShardQueue(cutter)
    cutter.error = ModelError("it has no weights", code="no_weights") if expected else KeyError("a bug")
    cutter.may_end.set()
    queue.submit("a/one")
    nursery.start_soon(queue.run)
    await until(lambda: state(queue, "a/one") == "failed")
    found = queue.status("a/one")
    assert found is not None
    assert found.error is not None
    assert found.error.code == ("no_weights" if expected else "internal")
    cutter.error = None
    queue.submit("a/one")
    await until(lambda: state(queue, "a/one") == "ready")


async def test_the_queue_is_bounded(cutter: Cutter) -> None:
    queue = ShardQueue(cutter)
    for number in range(16):
        queue.submit(f"a/m{number}")
    with pytest.raises(CapacityError):
        queue.submit("a/m16")
    assert queue.status("a/m16") is None
    assert queue.submit("a/m3").state == "queued"


async def test_only_the_newest_outcomes_are_remembered(cutter: Cutter, nursery: trio.Nursery) -> None:
    queue = ShardQueue(cutter)
    cutter.may_end.set()
    nursery.start_soon(queue.run)
    for number in range(70):
        queue.submit(f"a/m{number}")
        await until(lambda number=number: state(queue, f"a/m{number}") == "ready")  # type: ignore[misc]
    assert [state(queue, f"a/m{number}") for number in (5, 6, 69)] == ["", "ready", "ready"]


async def test_cancelling_does_not_wait_for_the_thread(cutter: Cutter) -> None:
    queue = ShardQueue(cutter)
    queue.submit("a/one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.run)
        await until(lambda: bool(cutter.begun))
        nursery.cancel_scope.cancel()
    await until(lambda: cutter.ended == ["a/one"])  # at its next report
    assert not cutter.may_end.is_set()


def test_two_processes_take_turns(tmp_path: Path) -> None:
    waited: list[Progress] = []
    order: list[str] = []

    def wait() -> None:
        with hold_lock(tmp_path / "lock", waited.append):
            order.append("second")

    with hold_lock(tmp_path / "lock", waited.append):
        thread = threading.Thread(target=wait)  # the lock is on the open file: a thread stands for a process
        thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while not waited:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert (order, waited[0].stage) == (["first", "second"], "waiting")


def test_one_model_too_many_is_refused_before_it_is_cut(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, data in sharded_llama().items():
        (tmp_path / "model" / name).write_bytes(data)
    library, catalogue = Library(tmp_path / "data"), Catalogue(tmp_path / "data")
    for number in range(MAX_MODELS):
        catalogue.add(Listed(f"m{number}", f"{number:064x}"))
    sharder = Sharder(Identity(bytes(32)), library, catalogue, tmp_path / "data")
    with pytest.raises(CapacityError) as caught:
        sharder.shard(str(tmp_path / "model"), silent)
    assert caught.value.code == "too_many_models"
    assert not library.store.digests()
    catalogue.remove("m0")
    manifest = sharder.shard(str(tmp_path / "model"), silent)
    assert catalogue.models()[-1] == Listed("model", manifest.digest)
    assert sharder.shard(str(tmp_path / "model"), silent) == manifest  # it is in the list already


def test_files_that_a_removal_takes_while_a_model_is_cut_are_cut_again(tmp_path: Path) -> None:
    """What is not listed yet protects nothing: a removal in the last moment may take what two models share."""
    (tmp_path / "model").mkdir()
    for name, data in sharded_llama().items():
        (tmp_path / "model" / name).write_bytes(data)
    library = Library(tmp_path / "data")

    class Removed(Catalogue):
        """Loses a file just before the first model is listed."""

        def add(self, model: Listed) -> None:
            if not self.models():
                library.store.path(dict(library.manifests())[model.manifest].layers[1].digest).unlink()
            super().add(model)

    catalogue = Removed(tmp_path / "data")
    sharder = Sharder(Identity(bytes(32)), library, catalogue, tmp_path / "data")
    manifest = sharder.shard(str(tmp_path / "model"), silent)
    assert [listed.manifest for listed in catalogue.models()] == [manifest.digest]
    assert is_whole(library.store, manifest)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()

    def at(now: float, done: int, stage: str = "downloading") -> float | None:
        return rate.update(Progress(stage, "x", done, 10_000), now)  # type: ignore[arg-type]

    assert at(0.0, 1_000) is None  # what was here before came at no rate
    assert at(1.0, 1_100) == 100
    assert [at(float(second), 1_100) for second in range(2, 7)][-1] == 0
    assert at(7.0, 2_100) == pytest.approx(200)
    assert at(7.5, 0, "verifying") is None
    assert at(8.0, 500, "verifying") == 1_000
    assert at(9.0, 1, "cutting") is None
    assert at(10.0, 2, "cutting") is None


def test_progress_in_words() -> None:
    assert progress_text(Progress("downloading", "x", 1 << 20, 3 << 20), None) == "1.0 MiB of 3.0 MiB"
    assert progress_text(Progress("verifying", "x", 1 << 20, 3 << 20), 524_288) == (
        "1.0 MiB of 3.0 MiB, 512.0 KiB/s, 4 s left"
    )
    assert progress_text(Progress("cutting", "layer 3", 3, 9), None) == "3 of 9 files"
