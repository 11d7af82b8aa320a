"""A worker whose coordinators are silent: what it chooses, and that one that comes back finds nothing to mend."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from azu.channel import Channel
from azu.distribution import LayerServer, Library
from azu.models.manifest import Manifest
from azu.models.memory import stage_memory
from azu.overlay import Overlay
from azu.records import WorkerRecord
from azu.tickets import Assignment, sign_assignment
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, LAYERS_PROTOCOL, Accepted, Assign
from coordinator.placement import Placer, missing_layers
from coordinator.swarm import SwarmView
from node.alone import choose
from node.engine.device import open_device_thread
from node.engine.hardware import find_device
from node.trust import Trust
from node.worker import Worker
from tests.node.real_stages import LIMIT, N_LAYERS, TinyModel, identity, peer, tiny_model
from tests.worker_records import MANIFEST, OTHER, OURS, room_for, worker

COORDINATOR = 99
MODELS = {MANIFEST.digest: MANIFEST}


def idle(number: int = 9, layers: int = 6, **changes: Any) -> WorkerRecord:
    return worker(number, vram_total=room_for(layers), jobs=0, **changes)


def holding(number: int, start: int, end: int, state: str = "loaded", **changes: Any) -> WorkerRecord:
    return worker(number, (OURS, start, end, state), vram_total=room_for(12), kv_tokens=1, **changes)


def chosen(
    me: WorkerRecord, *others: WorkerRecord, models: dict[str, Manifest] | None = None
) -> tuple[int, int] | None:
    wish = choose(MODELS if models is None else models, others, me)
    return (wish.start, wish.end) if wish else None


# --- what it chooses


def test_it_fills_the_hole() -> None:
    assert chosen(idle(), holding(1, 0, 6)) == (6, 12)
    assert chosen(idle(), holding(1, 6, 12)) == (0, 6)


def test_of_what_is_covered_it_makes_the_weakest_safer() -> None:
    workers = [holding(1, 0, 6), holding(2, 0, 6), holding(3, 6, 12)]
    assert chosen(idle(), *workers) == (6, 12)


def test_a_hole_that_is_too_large_for_one_is_begun() -> None:
    """From whichever end more fits: the last stage has the model's head."""
    first = chosen(idle(layers=3), holding(1, 0, 6))
    assert first is not None
    assert 6 <= first[0] < first[1] <= 12
    assert first[1] - first[0] >= 3


def test_what_others_load_is_no_hole() -> None:
    assert chosen(idle(), holding(1, 0, 6), holding(2, 6, 12, "loading")) == (3, 9), "where it helps both"
    assert chosen(idle(layers=3), holding(1, 0, 12, "loading")) is None


def test_what_one_that_leaves_holds_is_a_hole() -> None:
    assert chosen(idle(), holding(1, 0, 6), holding(2, 6, 12, leaving=True)) == (6, 12)


def test_it_takes_nothing_of_models_that_it_may_not_serve_or_that_others_run_in_another_format() -> None:
    assert chosen(idle(), holding(1, 0, 6), models={}) is None
    assert chosen(idle(dtype="float32", layers=12), holding(1, 0, 6)) != (6, 12)


def test_the_model_that_is_not_covered_comes_first() -> None:
    other = replace(MANIFEST, model_id="owner/other")
    models = {OURS: MANIFEST, other.digest: other}
    me, whole = worker(9, vram_total=2**30, jobs=0), holding(1, 0, 12)
    for uncovered, covered in ((other, OURS), (MANIFEST, other.digest)):
        held = whole.model_copy(update={"ranges": (whole.ranges[0].model_copy(update={"manifest": covered}),)})
        wish = choose(models, [held], me)
        assert wish is not None
        assert wish.manifest == uncovered.digest


def test_one_that_holds_layers_stays_where_moving_gains_little() -> None:
    fast = {"layer_us": 1_000, "jobs": 0}
    crowd = [holding(number, 0, 6, **fast) for number in (1, 2, 3)]
    assert chosen(crowd[0], *crowd[1:], holding(4, 6, 12, **fast), holding(5, 6, 12, **fast)) is None
    moves = [chosen(me, *(w for w in crowd if w is not me), holding(4, 6, 12, **fast)) for me in crowd]
    assert sorted(map(str, moves)) == ["(6, 12)", "None", "None"], "one of them moves to the stage that hangs on one"


def test_one_that_holds_layers_of_a_model_stays_with_it() -> None:
    me = worker(1, (OTHER, 0, 12, "loaded"), vram_total=room_for(12), jobs=0)
    assert chosen(me, holding(2, 0, 6)) is None


def test_trust_on_first_use_is_no_leave_to_serve_anybody() -> None:
    open_to_all, named = Trust(()), Trust(("a",))
    assert open_to_all("a")
    assert not open_to_all.serves("a")
    assert named.serves("a")
    assert not named.serves("b")
    open_to_all.follow("b")
    assert open_to_all.serves("b")
    assert not open_to_all.serves("a")


# --- real workers


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    found = tiny_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model" / "store", tmp_path / "published" / "layers")
    Library(tmp_path / "published").publish(identity(COORDINATOR), found.manifest)
    return found


@asynccontextmanager
async def running(number: int, folder: Path, vram: int) -> AsyncIterator[tuple[Worker, Overlay]]:
    library = Library(folder)
    async with peer(number) as overlay, open_device_thread() as thread:
        trust = Trust((identity(COORDINATOR).peer_id,))
        device = find_device("cpu", vram, 1)
        one = Worker(
            identity(number), overlay, thread, device, library, LayerServer(library), dtype="float32", trust=trust,
            payout_address="", use_hub=False,
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            yield one, overlay
            nursery.cancel_scope.cancel()


async def assign(coordinator: Overlay, overlay: Overlay, manifest: str, start: int, end: int) -> None:
    order = Assignment(
        worker=overlay.peer_id, coordinator=coordinator.peer_id, manifest=manifest, start=start, end=end,
        dtype="float32", kv_tokens=64, sequence=1, expires_at=int(time.time()) + 60,
    )  # fmt: skip
    async with await coordinator.open_stream(overlay.peer_id, CONTROL_PROTOCOL) as stream:
        channel = Channel(stream, CONTROL)
        await channel.send(Assign(), sign_assignment(identity(COORDINATOR), order))
        await channel.expect(Accepted)


async def until_loaded(worker: Worker) -> None:
    while worker.jobs.loaded is None:
        await trio.sleep(0.02)


async def test_a_newcomer_fills_the_hole_while_the_coordinator_is_gone_which_then_leaves_it_so(
    tmp_path: Path, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_ALONE_S", 2.0), ("_LOOK_S", 0.2), ("_CHANCE_S", 0.2)):
        monkeypatch.setattr(f"node.alone.{name}", seconds)
    half = [stage_memory(model.manifest, *part, "float32", 64).total for part in ((0, 2), (2, N_LAYERS))]
    published = Library(tmp_path / "published")
    with trio.fail_after(LIMIT):
        async with running(1, tmp_path / "published", half[0]) as (first, first_overlay):
            async with peer(COORDINATOR) as coordinator:
                coordinator.handle(LAYERS_PROTOCOL, LayerServer(published).handle)
                await coordinator.connect(first_overlay.peer_id, first_overlay.addrs)
                await assign(coordinator, first_overlay, model.manifest.digest, 0, 2)
                await until_loaded(first)
            async with running(2, tmp_path / "newcomer", half[1]) as (second, second_overlay):
                await second_overlay.bootstrap(first_overlay.addrs)
                await until_loaded(second)
                before = first.jobs.loaded, second.jobs.loaded
                assert [(each.start, each.end) for each in before if each] == [(0, 2), (2, N_LAYERS)]
                async with peer(COORDINATOR) as coordinator, trio.open_nursery() as nursery:
                    view = SwarmView(coordinator)
                    placer = Placer(identity(COORDINATOR), view, lambda: [model.manifest], kv_tokens=64)
                    nursery.start_soon(view.run)
                    await coordinator.bootstrap(first_overlay.addrs)
                    while missing_layers(model.manifest, view.workers()):
                        await trio.sleep(0.05)
                    for _ in range(3):
                        await placer._tick()
                    assert not second._alone._is_alone()
                    nursery.cancel_scope.cancel()
                assert (first.jobs.loaded, second.jobs.loaded) == before, "it had them load anew"
