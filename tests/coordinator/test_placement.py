"""Handing out what is planned: assignments, refusals, and room for models that stay uncovered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from azu.channel import RefusedError
from azu.identity import Identity
from azu.planning import ModelShape, place, views_for
from azu.records import WorkerRecord
from azu.tickets import open_assignment
from azu.wire.messages import Refused
from coordinator.placement import Placer, missing_layers
from tests.worker_records import MANIFEST, OTHER, OURS, room_for, worker

OTHER_MODEL = replace(MANIFEST, model_id="owner/other")


def test_missing_layers_are_those_that_nobody_has_loaded() -> None:
    assert missing_layers(MANIFEST, []) == ((0, 12),)
    workers = [
        worker(1, (OURS, 0, 4, "loaded")),
        worker(2, (OURS, 4, 6, "loading")),
        worker(3, (OURS, 6, 7, "cached")),
        worker(4, (OTHER, 0, 12, "loaded")),
        worker(5, (OURS, 8, 12, "loaded")),
    ]
    assert missing_layers(MANIFEST, workers) == ((4, 8),)
    # Of ranges that overlap, jobs run a part.
    assert missing_layers(MANIFEST, [*workers, worker(6, (OURS, 3, 9, "loaded"))]) == ()
    assert missing_layers(MANIFEST, [*workers, worker(6, (OURS, 4, 8, "loaded"))]) == ()


@pytest.mark.parametrize(("start", "end"), [(0, 1_000), (12, 13), (500, 600), (5, 5), (9, 2)])
def test_a_record_that_claims_layers_that_do_not_exist_hurts_nobody(start: int, end: int) -> None:
    """Whoever has a key can sign such a record."""
    liar = worker(1, (OURS, start, end, "loaded"))
    assert missing_layers(MANIFEST, [liar]) == ((0, 12),)

    def stage_bytes(first: int, last: int) -> int:
        assert 0 <= first < last <= 12
        return last - first

    plan = place(ModelShape(12, stage_bytes), views_for(MANIFEST, [liar, worker(2)]))
    assert [(p.start, p.end) for p in plan] == [(0, 12)]


class SwarmTwin:
    """Workers whose records never change, and what they are assigned; `refusing` ones say no."""

    def __init__(self, *workers: WorkerRecord) -> None:
        self._workers = workers
        self.refusing: set[str] = set()
        self.unloadable = ""  # a manifest that no worker can load
        self.taken: list[tuple[str, int, int]] = []
        self.asked = 0

    def workers(self) -> tuple[WorkerRecord, ...]:
        return self._workers

    async def assign(self, peer_id: str, envelope: bytes) -> None:
        self.asked += 1
        if peer_id in self.refusing:
            raise RefusedError(peer_id, Refused(code="busy", message="no"))
        assignment = open_assignment(envelope)[1]
        if assignment.manifest == self.unloadable:
            raise RefusedError(peer_id, Refused(code="load_failed", message="these could not be loaded"))
        self.taken.append((peer_id, assignment.start, assignment.end))


def placer(swarm: SwarmTwin) -> Placer:
    return Placer(Identity(bytes(32)), swarm, lambda: [MANIFEST], kv_tokens=1)  # type: ignore[arg-type]


async def test_a_worker_that_took_layers_tears_no_hole_until_its_record_shows_them(
    autojump_clock: trio.testing.MockClock,
) -> None:
    # The loaded worker could hold the whole model, so that a plan from scratch would take its layers away.
    holds = worker(1, (MANIFEST.digest, 6, 12, "loaded"), vram_total=room_for(12))
    idle = worker(2, vram_total=room_for(8))
    swarm = SwarmTwin(holds, idle)
    with trio.move_on_after(1.5):  # two ticks
        await placer(swarm).run()
    assert swarm.taken == [(idle.peer_id, 0, 6)]


async def test_a_worker_that_refuses_is_left_alone_and_still_holds_its_layers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    whole = room_for(12)
    refuses = worker(1, (MANIFEST.digest, 3, 12, "loaded"), vram_total=whole, jobs=0)
    other = worker(2, (MANIFEST.digest, 0, 2, "loaded"), vram_total=room_for(2))
    swarm = SwarmTwin(refuses, other)
    swarm.refusing = {refuses.peer_id}
    with trio.move_on_after(10):
        await placer(swarm).run()
    assert (swarm.asked, swarm.taken) == (1, [])


async def test_a_model_that_cannot_be_loaded_keeps_no_worker_from_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    swarm = SwarmTwin(worker(1, vram_total=room_for(12)))
    swarm.unloadable = OTHER_MODEL.digest
    with trio.move_on_after(60):
        await Placer(Identity(bytes(32)), swarm, lambda: [OTHER_MODEL, MANIFEST], kv_tokens=1).run()  # type: ignore[arg-type]
    assert swarm.taken[0][1:] == (0, 12)
    alone = SwarmTwin(worker(1, vram_total=room_for(12)))
    alone.unloadable = MANIFEST.digest
    with trio.move_on_after(60):
        await placer(alone).run()
    assert alone.asked > 2, "it may have been the network's fault"


async def test_layers_of_a_model_that_is_not_served_any_more_make_room(autojump_clock: trio.testing.MockClock) -> None:
    holds = worker(1, (OTHER, 0, 12, "loaded"), vram_total=room_for(12))
    swarm = SwarmTwin(holds)
    retired: set[str] = set()
    live = Placer(Identity(bytes(32)), swarm, lambda: [MANIFEST], kv_tokens=1, retired=lambda: retired)  # type: ignore[arg-type]
    with trio.move_on_after(1.5):
        await live.run()
    assert swarm.taken == []
    retired.add(OTHER)
    with trio.move_on_after(0.5):
        await live.run()
    assert swarm.taken == [(holds.peer_id, 0, 12)]


async def test_replicas_make_room_for_a_model_that_would_stay_uncovered(autojump_clock: trio.testing.MockClock) -> None:
    whole = room_for(12)
    first = worker(1, (OTHER, 0, 12, "loaded"), vram_total=whole, jobs=0)
    replica = worker(2, (OTHER, 0, 12, "loaded"), vram_total=whole, jobs=0)
    only = worker(3, (OTHER, 0, 13, "loaded"), vram_total=whole, jobs=0)
    within = worker(4, (OTHER, 3, 15, "loaded"), vram_total=whole, jobs=0)
    last = worker(5, (OTHER, 9, 16, "loaded"), vram_total=whole, jobs=0)
    for workers, spares in (
        ((first, replica), (first, replica)),
        ((only, within, last), (within, last)),  # one of them, as two hold all that there is
        ((only, replica, last), (replica,)),
    ):
        swarm = SwarmTwin(*workers)
        with trio.move_on_after(0.5):
            await placer(swarm).run()
        (given,) = swarm.taken
        assert given in {(spare.peer_id, 0, 12) for spare in spares}  # one of them, and no more


async def test_no_replica_is_given_up_where_it_runs_a_job_or_is_of_no_use(
    autojump_clock: trio.testing.MockClock,
) -> None:
    held = (OTHER, 0, 12, "loaded")
    busy = [worker(number, held, vram_total=room_for(12), jobs=1) for number in (1, 2)]
    small = [worker(number, held, vram_total=room_for(3), jobs=0) for number in (1, 2)]
    idle = [worker(1, held, jobs=0), worker(2, held, jobs=0), worker(3, vram_total=room_for(12))]
    for workers, expected in ((busy, []), (small, []), (idle, [(idle[2].peer_id, 0, 12)])):
        swarm = SwarmTwin(*workers)
        with trio.move_on_after(0.5):
            await placer(swarm).run()
        assert swarm.taken == expected


async def test_what_another_coordinator_gave_out_is_planned_with_and_left_as_it_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    whole = room_for(12)
    others = {"vram_total": whole, "jobs": 0, "assigned_by": Identity(bytes([77]) * 32).peer_id}
    retired = worker(1, ("e" * 64, 0, 12, "loaded"), **others)
    replicas = [worker(number, (OTHER, 0, 12, "loaded"), **others) for number in (2, 3)]
    part = worker(4, (OURS, 6, 12, "loaded"), **others)
    idle = worker(5, vram_total=room_for(8))
    for workers, expected in (
        ([retired, *replicas], []),
        ([retired, *replicas, part], []),  # nor is a plan made from scratch
        ([retired, *replicas, part, idle], [(idle.peer_id, 0, 6)]),
    ):
        swarm = SwarmTwin(*workers)
        planning = Placer(Identity(bytes(32)), swarm, lambda: [MANIFEST], kv_tokens=1, retired=lambda: {"e" * 64})  # type: ignore[arg-type]
        with trio.move_on_after(0.5):
            await planning.run()
        assert swarm.taken == expected
