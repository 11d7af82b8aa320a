"""Routes against brute force."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.models.memory import MAX_JOBS
from azu.planning import Demand, Link, Links, Placement, WorkerView, place
from benchmarks.machines import large_model, lines, machines
from coordinator.planning import find_route, stand_in
from coordinator.planning import routing as routing_module
from coordinator.planning.lines import HANDLING_S
from tests.planning.swarms import Range, after, assert_covers_once, cuts, holding, route


@settings(max_examples=200)
@given(
    n_layers=st.integers(1, 6),
    views=st.lists(
        st.tuples(
            st.tuples(st.integers(0, 6), st.integers(0, 6)),
            st.booleans(),
            st.integers(0, 3),
            st.integers(0, 4),
        ),
        max_size=6,
    ),
    tokens=st.integers(1, 4),
)
def test_routes_are_the_shortest_ready_chains_with_room(
    n_layers: int, views: list[tuple[Range, bool, int, int]], tokens: int
) -> None:
    workers = [
        WorkerView(f"w{index}", 0, held=held, ready=ready, jobs=jobs, kv_tokens_free=free)
        for index, (held, ready, jobs, free) in enumerate(views)
    ]
    usable = [w for w in workers if w.ready and w.kv_tokens_free >= tokens and w.held and w.held[0] < w.held[1]]
    chains = [
        (stages, sum(worker.jobs for worker in chosen))
        for stages in range(1, min(n_layers, len(usable)) + 1)
        for chosen in permutations(usable, stages)
        if [layer for worker in chosen for layer in range(*worker.held or (0, 0))] == list(range(n_layers))
    ]
    found = route(n_layers, workers, tokens)
    if not chains:
        assert found is None
        return
    assert found is not None
    assert_covers_once(n_layers, found)
    by_id = {worker.peer_id: worker for worker in usable}
    assert all(by_id[p.peer_id].held == (p.start, p.end) for p in found)
    assert (len(found), sum(by_id[p.peer_id].jobs for p in found)) == min(chains)
    assert route(n_layers, workers[::-1], tokens) == found


@pytest.mark.parametrize(
    ("ready", "free", "routed"), [(True, 100, True), (True, 99, False), (False, 100, False), (True, 101, True)]
)
def test_only_ready_workers_with_room_are_routed_through(ready: bool, free: int, routed: bool) -> None:
    worker = holding("a", 0, 10, ready=ready, kv_tokens_free=free)
    assert (route(10, [worker], tokens=100) is not None) == routed


@pytest.mark.parametrize(("jobs", "routed"), [(MAX_JOBS - 1, True), (MAX_JOBS, False)])
def test_a_worker_with_as_many_jobs_as_it_may_run_gets_no_more(jobs: int, routed: bool) -> None:
    worker = holding("a", 0, 10, ready=True, kv_tokens_free=100, jobs=jobs)
    assert (route(10, [worker], tokens=1) is not None) == routed


def test_jobs_are_spread_over_replicas() -> None:
    held = [("a", (0, 5), 3), ("b", (0, 5), 1), ("c", (5, 9), 0), ("d", (5, 9), 2)]
    workers = [holding(name, *range_, ready=True, kv_tokens_free=10, jobs=jobs) for name, range_, jobs in held]
    assert route(9, workers, 1) == (Placement("b", 0, 5), Placement("c", 5, 9))


# --- the time that a token takes


@st.composite
def swarms(draw: st.DrawFn, n_layers: int = 5, most: int = 6) -> list[WorkerView]:
    """Workers that hold ranges, with measured speeds, jobs, and a few behind relays."""
    ends = st.tuples(st.integers(0, n_layers - 1), st.integers(1, n_layers)).filter(lambda pair: pair[0] < pair[1])
    return [
        WorkerView(
            f"w{index}",
            0,
            held=draw(ends),
            ready=True,
            kv_tokens_free=10,
            jobs=draw(st.integers(0, 3)),
            decode_s=draw(st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.2])),
            decode_job_s=draw(st.sampled_from([0.0, 0.004])),
            prefill_s=draw(st.sampled_from([0.0, 0.0005, 0.003])),
            relayed=draw(st.booleans()),
        )
        for index in range(draw(st.integers(1, most)))
    ]


def measured(data: st.DataObject, workers: Sequence[WorkerView]) -> Links:
    """Lines of which some were measured, faster or slower than the default."""
    pairs = [(one.peer_id, other.peer_id) for one in workers for other in workers if one is not other]
    chosen = data.draw(st.lists(st.sampled_from(pairs), max_size=6, unique=True)) if pairs else []
    links = {pair: Link(data.draw(st.sampled_from([0.001, 0.02, 0.4])), 1e9) for pair in chosen}
    return Links(links, hop_bytes=1_000)


def seconds_of(
    chain: Sequence[tuple[WorkerView, Range]], workers: Sequence[WorkerView], links: Links, demand: Demand
) -> float:
    """The prompt's way through the stages, and the tokens' ways round the ring, added up by hand."""
    typical = statistics.median([w.decode_s for w in workers if w.decode_s] or [0.0])
    usual = statistics.median([w.prefill_s for w in workers if w.prefill_s] or [0.0])
    total = 0.0
    for worker, (start, end) in chain:
        alone = worker.decode_s or typical
        token = alone + worker.jobs * (worker.decode_job_s or 0.15 * alone)
        total += (end - start) * (demand.tokens * token + demand.prompt * (worker.prefill_s or usual))
    if len(chain) > 1:
        ring = [*chain, chain[0]]
        total += sum(demand.tokens * (links.hop_s(one[0], other[0]) + HANDLING_S) for one, other in pairwise(ring))
        if demand.prompt:
            total += sum(links.hop_s(one[0], other[0], demand.prompt) + HANDLING_S for one, other in pairwise(chain))
    return total


def all_chains(
    n_layers: int, workers: Sequence[WorkerView], *, parts: bool
) -> Iterator[list[tuple[WorkerView, Range]]]:
    for stages in range(1, min(n_layers, len(workers)) + 1):
        for chain in cuts(n_layers, stages):
            for chosen in permutations(workers, stages):
                if all(may_run(worker, part, parts) for worker, part in zip(chosen, chain, strict=True)):
                    yield list(zip(chosen, chain, strict=True))


def may_run(worker: WorkerView, part: Range, parts: bool) -> bool:
    start, end = worker.held or (0, 0)
    return (start <= part[0] and part[1] <= end) if parts else (start, end) == part


@pytest.mark.parametrize("parts", [False, True])
@settings(max_examples=250)
@given(st.data())
def test_the_route_is_the_fastest_of_all_chains(parts: bool, data: st.DataObject) -> None:
    """Objective: the job's seconds, whatever lines were measured; with parts, any borders, and no worker twice."""
    workers = data.draw(swarms())
    links = measured(data, workers)
    demand = Demand(data.draw(st.sampled_from([0, 1, 700])), data.draw(st.sampled_from([1, 40])))
    chains = [seconds_of(chain, workers, links, demand) for chain in all_chains(5, workers, parts=parts)]
    found = find_route(5, workers, 10, demand=demand, links=links, parts=parts)
    if not chains:
        assert found is None
        return
    assert found is not None
    by_id = {worker.peer_id: worker for worker in workers}
    chain = [(by_id[p.peer_id], (p.start, p.end)) for p in found.stages]
    assert_covers_once(5, found.stages)
    assert len({p.peer_id for p in found.stages}) == len(found.stages)
    assert all(may_run(worker, part, parts) for worker, part in chain)
    assert found.seconds == pytest.approx(seconds_of(chain, workers, links, demand), abs=1e-6)
    assert found.seconds == pytest.approx(min(chains), abs=1e-6)
    assert find_route(5, workers[::-1], 10, demand=demand, links=links, parts=parts) == found


def test_a_long_prompt_goes_where_prompts_are_fast_and_a_long_answer_where_tokens_are() -> None:
    common = {"held": (0, 5), "ready": True, "kv_tokens_free": 10_000}
    reader = WorkerView("reader", 0, **common, decode_s=0.02, prefill_s=0.0001)  # type: ignore[arg-type]
    writer = WorkerView("writer", 0, **common, decode_s=0.01, prefill_s=0.001)  # type: ignore[arg-type]
    for demand, best in ((Demand(4_000, 10), "reader"), (Demand(10, 400), "writer")):
        found = find_route(5, [reader, writer], 10, demand=demand)
        assert found is not None
        assert found.stages == (Placement(best, 0, 5),)
        assert found.runners_up == ("writer" if best == "reader" else "reader",)


@given(st.data(), st.booleans())
def test_a_runner_up_can_take_over_its_stage(data: st.DataObject, parts: bool) -> None:
    workers = data.draw(swarms())
    found = find_route(5, workers, 10, parts=parts)
    if found is None:
        return
    chosen = {p.peer_id for p in found.stages}
    for stage, runner_up in zip(found.stages, found.runners_up, strict=True):
        able = {w.peer_id for w in workers if may_run(w, (stage.start, stage.end), parts)} - chosen
        assert runner_up in able if able else runner_up is None
        other = stand_in(workers, stage.start, stage.end, 10, without=chosen, parts=parts)
        assert (other.peer_id if other else None) == runner_up


def test_a_stand_in_has_few_faults_room_and_speed() -> None:
    common = {"held": (0, 5), "ready": True, "kv_tokens_free": 10}
    workers = [
        WorkerView("fast but faulty", 0, **common, decode_s=0.001, faults=2),  # type: ignore[arg-type]
        WorkerView("full", 0, **common | {"kv_tokens_free": 9}, decode_s=0.001),  # type: ignore[arg-type]
        WorkerView("slow", 0, **common, decode_s=0.2),  # type: ignore[arg-type]
        WorkerView("good", 0, **common, decode_s=0.1),  # type: ignore[arg-type]
    ]
    found = stand_in(workers, 0, 5, 10)
    assert found is not None
    assert found.peer_id == "good"
    assert stand_in(workers, 0, 4, 10) is None
    assert stand_in(workers, 0, 4, 10, parts=True) == found
    assert stand_in(workers, 0, 5, 10, without=[worker.peer_id for worker in workers]) is None


def test_a_loaded_worker_is_avoided_when_it_is_slower_for_it() -> None:
    fast = WorkerView("fast", 0, held=(0, 5), ready=True, kv_tokens_free=10, decode_s=0.01, decode_job_s=0.005)
    slow = WorkerView("slow", 0, held=(0, 5), ready=True, kv_tokens_free=10, decode_s=0.03)
    assert route(5, [fast, slow], 10) == (Placement("fast", 0, 5),)
    assert route(5, [replace(fast, jobs=5), slow], 10) == (Placement("slow", 0, 5),)


def test_a_worker_may_be_joined_in_the_middle_of_its_range() -> None:
    workers = [
        WorkerView("a", 0, held=(0, 12), ready=True, kv_tokens_free=10, decode_s=0.05),
        WorkerView("b", 0, held=(4, 16), ready=True, kv_tokens_free=10, decode_s=0.01),
        WorkerView("c", 0, held=(14, 20), ready=True, kv_tokens_free=10, decode_s=0.01),
    ]
    found = find_route(20, workers, 10, parts=True)
    assert found is not None
    assert found.stages == (Placement("a", 0, 4), Placement("b", 4, 14), Placement("c", 14, 20))
    assert find_route(20, workers, 10) is None


def test_a_job_does_not_go_through_its_stages_stand_in_for_a_line_that_was_measured_a_little_shorter() -> None:
    """It would have a hop more and save nothing, and nobody could take the stage over."""
    common = {"ready": True, "kv_tokens_free": 10, "decode_s": 0.001}
    workers = [WorkerView("a", 0, held=(0, 6), **common)]  # type: ignore[arg-type]
    workers += [WorkerView(name, 0, held=(6, 12), **common) for name in ("b", "c")]  # type: ignore[arg-type]
    rtts = {("a", "b"): 0.0005, ("b", "a"): 0.004, ("b", "c"): 0.0005, ("c", "a"): 0.0005, ("a", "c"): 0.004}
    links = Links({pair: Link(rtt_s, 1e9) for pair, rtt_s in rtts.items()})
    found = find_route(12, workers, 10, links=links, parts=True)
    assert found is not None
    assert len(found.stages) == 2
    assert found.runners_up[1] is not None


def test_no_worker_has_two_stages_where_that_would_be_fastest() -> None:
    """The layers in the middle run ten times faster elsewhere, but a job has one stage for each peer."""
    links = Links(hop_bytes=0, direct=Link(0.002, 1e9))
    slow = WorkerView("slow", 0, held=(0, 12), ready=True, kv_tokens_free=10, decode_s=0.1)
    fast = WorkerView("fast", 0, held=(4, 8), ready=True, kv_tokens_free=10, decode_s=0.01)
    ends = [WorkerView(name, 0, held=(8, 12), ready=True, kv_tokens_free=10, decode_s=0.11) for name in ("x", "y")]
    found = find_route(12, [slow, fast], 10, links=links, parts=True)
    assert found is not None
    assert found.stages == (Placement("slow", 0, 12),)
    found = find_route(12, [slow, fast, *ends], 10, links=links, parts=True)
    assert found is not None
    assert found.stages == (Placement("slow", 0, 4), Placement("fast", 4, 8), Placement("x", 8, 12))
    assert found.runners_up == (None, None, "y")


@pytest.mark.parametrize("demand", [Demand(), Demand(500, 200), Demand(8_000, 50)])
def test_in_a_large_swarm_the_quickest_holders_of_each_layer_are_enough(
    demand: Demand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 workers some 60 are looked at, with lines that were measured and jobs that run."""
    shape, workers = large_model(16), machines(200, seed=2)
    running = [
        replace(worker, jobs=index % 7, kv_tokens_free=100)
        for index, worker in enumerate(after(workers, place(shape, workers)))
    ]
    links = lines(workers, seed=2)
    found = find_route(16, running, 100, demand=demand, links=links, parts=True)
    monkeypatch.setattr(routing_module, "_MOST_HOLDERS", len(running))
    best = find_route(16, running, 100, demand=demand, links=links, parts=True)
    assert found is not None
    assert best is not None
    assert_covers_once(16, found.stages)
    assert found.seconds <= 1.02 * best.seconds
