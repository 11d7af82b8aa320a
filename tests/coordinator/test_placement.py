"""Worker records as the planner sees them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import trio
import trio.testing

from azu.channel import RefusedError
from azu.identity import Identity
from azu.models.manifest import Blob, LayerCache, Manifest, Weights
from azu.records import WorkerRecord
from azu.tickets import open_assignment
from azu.wire.messages import Refused
from coordinator.placement import Placer, missing_layers, network_of, shape_of, views_for
from coordinator.planning import ModelShape, place


def blob(number: int) -> Blob:
    return Blob(hashlib.sha256(bytes([number])).hexdigest(), 1_000, weights=(Weights("F16", 1_000, 1_000),))


MANIFEST = Manifest(
    model_id="owner/tiny",
    revision="main",
    origin="",
    architecture="LlamaForCausalLM",
    dtype="float16",
    n_layers=12,
    hidden_size=32,
    vocab_size=64,
    context_length=128,
    config=blob(0),
    tokenizer={},
    layers=tuple(blob(10 + index) for index in range(12)),
    caches=(LayerCache(32),) * 12,
    shared={"model.embed_tokens.weight": blob(1)},
    sources={},
    tied=True,
)
OTHER = "f" * 64


def worker(number: int, *ranges: tuple[str, int, int, str], **changes: Any) -> WorkerRecord:
    fields: dict[str, Any] = {
        "peer_id": Identity(bytes([number]) * 32).peer_id,
        "sequence": 1,
        "issued_at": 0,
        "expires_at": 1,
        "agent": "test",
        "protocols": (),
        "addrs": (),
        "device": "test",
        "dtype": "float16",
        "vram_total": 100,
        "vram_free": 60,
        "kv_tokens": 0,
        "kv_tokens_free": 7,
        "jobs": 3,
        "layer_us": 0,
        "ranges": [
            {"manifest": manifest, "start": start, "end": end, "state": state} for manifest, start, end, state in ranges
        ],
        "payout_address": "",
    }
    return WorkerRecord.model_validate(fields | changes)


OURS = MANIFEST.digest


@pytest.mark.parametrize(
    ("ranges", "held", "ready", "cached"),
    [
        ([], None, False, ()),
        ([(OURS, 0, 4, "loaded")], (0, 4), True, ()),
        ([(OURS, 0, 4, "loading")], (0, 4), False, ()),
        ([(OURS, 0, 4, "cached")], None, False, ((0, 4),)),
        ([(OURS, 0, 4, "cached"), (OURS, 2, 3, "loaded")], (2, 3), True, ((0, 4),)),
        ([(OTHER, 0, 4, "cached")], None, False, ()),
        ([(OTHER, 0, 4, "cached"), (OURS, 5, 9, "loaded")], (5, 9), True, ()),
    ],
)
def test_what_a_worker_holds_of_a_model(
    ranges: list[tuple[str, int, int, str]], held: object, ready: bool, cached: object
) -> None:
    (view,) = views_for(MANIFEST, [worker(1, *ranges)])
    assert (view.held, view.ready, view.cached) == (held, ready, cached)
    assert (view.vram, view.jobs, view.kv_tokens_free) == (100, 3, 7)


def test_what_a_worker_measured_and_where_it_is() -> None:
    relayed = "/ip4/198.18.0.1/tcp/4001/p2p/12D3KooWRelay/p2p-circuit"
    speed = {"decode_base_ns": 1_000_000, "decode_token_ns": 500_000, "prefill_ns": 40_000}
    record = worker(1, speed=speed, addrs=("/ip4/192.168.1.2/tcp/4001", relayed, "/ip4/8.8.4.4/tcp/4001"))
    (view,) = views_for(MANIFEST, [record], lambda peer_id: 3 if peer_id == record.peer_id else 0)
    assert (view.decode_s, view.network, view.faults, view.relayed) == (0.0015, "8.8.0.0/16", 3, False)
    assert (view.decode_job_s, view.prefill_s) == (0.0005, 0.00004)
    (view,) = views_for(MANIFEST, [worker(1, layer_us=1_500)])
    assert view.decode_s == 0.0015, "an older worker"
    (view,) = views_for(MANIFEST, [worker(1, addrs=(relayed,))])
    assert (view.decode_s, view.network, view.relayed) == (0.0, "", True)


@pytest.mark.parametrize(
    ("addr", "network"),
    [
        ("/ip6/2606:4700:1:2::3/tcp/1", "2606:4700:1::/48"),
        ("/ip4/127.0.0.1/tcp/1", ""),
        ("/dns4/example.org/tcp/1", ""),
        ("/ip4/999.1.1.1/tcp/1", ""),
        ("garbage", ""),
        ("/ip4", ""),
        ("", ""),
    ],
)
def test_a_network_is_that_of_a_public_address(addr: str, network: str) -> None:
    assert network_of([addr]) == network


@pytest.mark.parametrize("state", ["loaded", "loading"])
def test_a_worker_that_is_busy_with_another_model_is_left_out(state: str) -> None:
    busy = worker(1, (OTHER, 0, 4, state), (OURS, 0, 4, "cached"))
    free = worker(2)
    assert [view.peer_id for view in views_for(MANIFEST, [busy, free])] == [free.peer_id]


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
        self.taken: list[tuple[str, int, int]] = []
        self.asked = 0

    def workers(self) -> tuple[WorkerRecord, ...]:
        return self._workers

    async def assign(self, peer_id: str, envelope: bytes) -> None:
        self.asked += 1
        if peer_id in self.refusing:
            raise RefusedError(peer_id, Refused(code="busy", message="no"))
        assignment = open_assignment(envelope)[1]
        self.taken.append((peer_id, assignment.start, assignment.end))


def placer(swarm: SwarmTwin) -> Placer:
    return Placer(Identity(bytes(32)), swarm, lambda: [MANIFEST], kv_tokens=1)  # type: ignore[arg-type]


def room_for(layers: int) -> int:
    return shape_of(MANIFEST, "float16", 1).stage_bytes(0, layers)


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
    busy = worker(1, (MANIFEST.digest, 3, 12, "loaded"), vram_total=whole)
    other = worker(2, (MANIFEST.digest, 0, 2, "loaded"), vram_total=room_for(2))
    swarm = SwarmTwin(busy, other)
    swarm.refusing = {busy.peer_id}
    with trio.move_on_after(10):
        await placer(swarm).run()
    assert (swarm.asked, swarm.taken) == (1, [])


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
    only = worker(3, (OTHER, 0, 6, "loaded"), vram_total=whole, jobs=0)
    swarm = SwarmTwin(first, replica, only)
    with trio.move_on_after(0.5):
        await placer(swarm).run()
    (given,) = swarm.taken
    assert given in {(first.peer_id, 0, 12), (replica.peer_id, 0, 12)}  # one of the two, and not both


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
