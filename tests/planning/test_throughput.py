"""Placement by measured speeds: the fastest chain against brute force, replicas where they help, and moves that pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planning import Link, Links, ModelShape, Placement, WorkerView, holes, layered, place
from azu.planning.chain import slowest
from azu.planning.placement import FEW
from azu.planning.snapshot import powers, speeds
from benchmarks.machines import large_model, machines
from tests.planning.swarms import (
    LAYER,
    Range,
    after,
    assert_covers_once,
    assert_fits,
    cuts,
    flow,
    primary,
    ranges,
    uniform,
    whole_flow,
)

GIB = 2**30


def measured(peer_id: str, vram: int, seconds: float, **changes: object) -> WorkerView:
    return WorkerView(peer_id, vram, decode_s=seconds, **changes)  # type: ignore[arg-type]


def loaded(peer_id: str, start: int, end: int, seconds: float = 0.01, **changes: object) -> WorkerView:
    return measured(peer_id, 10_000, seconds, held=(start, end), ready=True, **changes)


def fastest_by_brute_force(shape: ModelShape, workers: Sequence[WorkerView]) -> tuple[int, float] | None:
    """(fewest stages, then the most tokens per second of the slowest), or None if the model cannot be covered."""
    power = powers(workers, Links())
    for stages in range(1, min(len(workers), shape.n_layers) + 1):
        rates = [
            min(
                power[w.peer_id].rate(end - start, shape.n_layers)
                for w, (start, end) in zip(chosen, chain, strict=True)
            )
            for chain in cuts(shape.n_layers, stages)
            for chosen in permutations(workers, stages)
            if all(shape.stage_bytes(*part) <= worker.vram for part, worker in zip(chain, chosen, strict=True))
        ]
        if rates:
            return stages, max(rates)
    return None


@settings(max_examples=300)
@given(
    n_layers=st.integers(1, 7),
    embedding=st.integers(0, 35),
    head=st.integers(0, 35),
    machines=st.lists(st.tuples(st.integers(0, 85), st.sampled_from([0.0, 1.0, 1.3, 2.0, 3.0, 7.0])), max_size=5),
)
def test_the_chain_has_the_fewest_stages_and_the_fastest_slowest_one(
    n_layers: int, embedding: int, head: int, machines: list[tuple[int, float]]
) -> None:
    shape = uniform(n_layers, embedding, head)
    workers = [measured(f"w{index}", vram, seconds) for index, (vram, seconds) in enumerate(machines)]
    plan = place(shape, workers)
    best = fastest_by_brute_force(shape, workers)
    if best is None:
        assert plan == ()
        return
    chain = primary(shape, workers)
    assert_fits(shape, workers, plan)
    assert_covers_once(n_layers, chain)
    assert len(chain) == best[0]
    assert slowest(shape, chain, powers(workers, Links())) == pytest.approx(best[1], rel=1e-5)


@st.composite
def snapshots(draw: st.DrawFn) -> tuple[ModelShape, list[WorkerView]]:
    """Swarms in any state: idle workers, held and cached ranges that may fit nothing, networks, jobs."""
    n_layers = draw(st.integers(1, 16))
    shape = uniform(n_layers, draw(st.integers(0, 20)), draw(st.integers(0, 20)))
    pairs = st.tuples(st.integers(0, n_layers - 1), st.integers(1, n_layers)).filter(lambda pair: pair[0] < pair[1])
    workers = []
    for index in range(draw(st.integers(0, 7) | st.integers(13, 14) | st.integers(FEW + 1, FEW + 3))):
        held = draw(st.none() | st.none() | pairs)
        workers.append(
            WorkerView(
                f"w{index:02}",
                max(draw(st.integers(0, 200)), shape.stage_bytes(*held) if held else 0),
                held=held,
                ready=draw(st.booleans()),
                cached=tuple(draw(st.lists(pairs, max_size=2))),
                jobs=draw(st.sampled_from([0, 0, 2])),
                network=draw(st.sampled_from(["", "a", "b"])),
                decode_s=draw(st.sampled_from([0.0, 0.01, 0.013, 0.02, 0.08])),
            )
        )
    return shape, workers


@settings(max_examples=120)
@given(snapshots())
def test_any_plan_covers_the_model_fits_and_is_the_last(snapshot: tuple[ModelShape, list[WorkerView]]) -> None:
    """Planning on the result changes nothing, and the order of the workers does not matter."""
    shape, workers = snapshot
    plan = place(shape, workers)
    assert_fits(shape, workers, plan)
    assert place(shape, workers[::-1]) == plan
    given_out = {p.peer_id for p in plan}
    done = [then if w.peer_id in given_out else w for w, then in zip(workers, after(workers, plan), strict=True)]
    if plan:
        assert not holes(shape.n_layers, [worker.held for worker in done if worker.held])
        assert flow(shape.n_layers, done) > 0
    assert place(shape, done) == ()
    for placement in plan:
        worker = next(worker for worker in workers if worker.peer_id == placement.peer_id)
        assert worker.held != (placement.start, placement.end)
        assert not (worker.held and worker.jobs and flow(shape.n_layers, workers) > 0), "it ran jobs, and had to move"


@settings(max_examples=60)
@given(snapshots())
def test_after_a_restart_of_all_everybody_loads_what_it_had(snapshot: tuple[ModelShape, list[WorkerView]]) -> None:
    shape, workers = snapshot
    workers = [replace(worker, held=None, cached=()) for worker in workers]
    plan = place(shape, workers)
    had = {p.peer_id: ((p.start, p.end),) for p in plan}
    assert set(place(shape, [replace(w, cached=had.get(w.peer_id, ())) for w in workers])) == set(plan)


@given(snapshots())
def test_no_plan_makes_a_covered_model_slower(snapshot: tuple[ModelShape, list[WorkerView]]) -> None:
    """In large swarms where workers run all that they hold, as what they give in parts would take long to find out."""
    shape, workers = snapshot
    workers = [replace(worker, held=worker.held or (0, shape.n_layers), vram=10_000) for worker in workers]
    tokens = flow if len(workers) <= FEW else whole_flow
    assert tokens(shape.n_layers, after(workers, place(shape, workers))) >= tokens(shape.n_layers, workers) * 0.9998


@pytest.mark.parametrize(
    ("count", "n_layers", "share"),
    [(12, 12, 0.9), (12, 40, 0.9), (24, 32, 0.9), (40, 32, 0.75), (100, 80, 0.8), (200, 126, 0.8)],
)
def test_a_swarm_gives_most_of_what_its_workers_have(count: int, n_layers: int, share: float) -> None:
    """Against each worker always busy with as many layers as it can hold, of which no plan can have more."""
    shape, workers = large_model(n_layers), machines(count, seed=1)
    workers = [replace(worker, vram=worker.vram * max(1, n_layers // count)) for worker in workers]
    power = powers(workers, Links())
    sizes = {
        worker.peer_id: max(n for n in range(n_layers + 1) if n == 0 or shape.stage_bytes(0, n) <= worker.vram)
        for worker in workers
    }
    bound = sum(n * power[peer_id].rate(n, n_layers) / n_layers for peer_id, n in sizes.items() if n)
    tokens = flow if count <= FEW else whole_flow
    assert tokens(n_layers, after(workers, place(shape, workers))) >= share * bound


# --- replicas


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(2, 8), st.data())
def test_no_layer_hangs_on_one_worker_or_one_network_where_there_are_enough(
    n_layers: int, most: int, data: st.DataObject
) -> None:
    """Eight times the workers that one chain needs, in two networks; each holds `most` layers."""
    count = 8 * -(-n_layers // most)
    networks = data.draw(st.permutations(["a", "b"] * (count // 2)))
    seconds = st.floats(0.01, 0.1)
    workers = [
        measured(f"w{index:03}", most * LAYER, data.draw(seconds), network=network)
        for index, network in enumerate(networks)
    ]
    plan = place(uniform(n_layers), workers)
    network = {worker.peer_id: worker.network for worker in workers}
    for layer in range(n_layers):
        assert {network[p.peer_id] for p in plan if p.start <= layer < p.end} == {"a", "b"}


def test_no_replica_is_taken_from_a_stage_that_it_keeps_safe() -> None:
    """The second stage is much slower with two workers than the first, and would gain from a third."""
    running = [loaded("a", 0, 10, 0.001), loaded("b", 10, 20, 0.08)]
    plan = place(uniform(20), [*running, *(measured(f"w{index}", 100, 0.08) for index in range(2))])
    assert ranges(plan) == [(0, 10), (10, 20)]


def test_a_replica_goes_where_no_neighbour_of_it_is() -> None:
    running = [loaded("a", 0, 10, network="east"), loaded("b", 10, 20, network="west")]
    spares = [measured(name, 100, 0.01, network=name) for name in ("east", "west")]
    assert place(uniform(20), [*running, *spares]) == (Placement("west", 0, 10), Placement("east", 10, 20))


def test_the_slowest_stage_gets_the_replica() -> None:
    running = [loaded("a", 0, 10, 0.01), loaded("b", 0, 10, 0.01), loaded("c", 10, 20, 0.01), loaded("d", 10, 20, 0.05)]
    (given_out,) = place(uniform(20), [*running, measured("w", 100, 0.01)])
    assert given_out.end - given_out.start == 10
    assert given_out.start >= 9


def test_one_that_stands_between_two_stages_helps_both() -> None:
    """Jobs go on to it from the middle of the first, and leave it in the middle of the second."""
    running = [loaded("a", 0, 10), loaded("b", 10, 20)]
    assert place(uniform(20), [*running, measured("w", 100, 0.01)]) == (Placement("w", 5, 15),)


def test_what_is_cached_is_preferred_until_it_is_clearly_slower() -> None:
    running = [loaded("a", 0, 10), loaded("b", 10, 20)]
    for cached in ((3, 13), (7, 17)):
        plan = place(uniform(20), [*running, measured("w", 100, 0.01, cached=(cached,))])
        assert plan == (Placement("w", *cached),)
    for cached in ((0, 10), (5, 8)):
        assert place(uniform(20), [*running, measured("w", 100, 0.01, cached=(cached,))]) == (Placement("w", 5, 15),)


def test_small_workers_hold_a_stage_together() -> None:
    running = [loaded("a", 0, 10)]
    assert place(uniform(10), [*running, measured("w1", 60, 0.01)]), "jobs may leave it within the range of the other"
    for seconds in (0.01, 0.02):
        plan = place(uniform(10), [*running, measured("w1", 60, 0.01), measured("w2", 60, seconds)])
        assert not holes(10, ranges(plan))


def test_a_machine_that_boasts_does_not_keep_its_stage_without_replicas() -> None:
    workers = [loaded("liar", 0, 10, 1e-6), *(loaded(f"w{index}", 0, 10) for index in range(3)), loaded("z", 10, 20)]
    assert max(speeds(workers).values()) <= 16 * min(speeds(workers).values())


# --- moves


def crowd(count: int, start: int, end: int, seconds: float = 0.01, **changes: object) -> list[WorkerView]:
    return [loaded(f"crowd{index}", start, end, seconds, **changes) for index in range(count)]


def test_a_worker_moves_from_a_crowd_to_a_stage_that_hangs_on_one() -> None:
    workers = [*crowd(3, 0, 10), loaded("alone", 10, 20)]
    (move,) = place(uniform(20), workers)
    assert (move.start, move.end) == (10, 20)
    assert place(uniform(20), [*crowd(2, 0, 10), loaded("alone", 10, 20)]) == (), "it would only change places"


def test_a_crowd_evens_out_and_then_rests() -> None:
    workers = [*crowd(10, 0, 10), loaded("a", 10, 20), loaded("b", 10, 20)]
    plan = place(uniform(20), workers)
    assert ranges(plan) == [(10, 20)] * 4
    assert place(uniform(20), after(workers, plan)) == ()
    five = [loaded(f"other{index}", 10, 20) for index in range(5)]
    assert place(uniform(20), [*crowd(6, 0, 10), *five]) == (), "a fifth faster is not worth a move"


@pytest.mark.parametrize("changes", [{"jobs": 1}, {"ready": False}, {"decode_s": 0.0}])
def test_nobody_moves_who_is_busy_loading_or_not_measured(changes: dict[str, object]) -> None:
    workers = [replace(worker, **changes) for worker in crowd(6, 0, 10)]  # type: ignore[arg-type]
    assert place(uniform(20), [*workers, loaded("a", 10, 20)]) == ()


def test_the_longer_the_layers_take_to_load_the_more_a_move_must_gain() -> None:
    """At 25 MB/s a stage of 60 GiB takes 43 minutes: five times as fast a stage is not enough, and a disk is quick."""
    shape = layered([6 * GIB] * 20)
    workers = [
        replace(worker, vram=80 * GIB) for worker in [*crowd(6, 0, 10), loaded("a", 10, 20), loaded("b", 10, 20)]
    ]
    assert place(shape, workers) == ()
    cached: tuple[Range, ...] = ((10, 20),)
    plan = place(shape, [replace(worker, cached=cached if worker.peer_id == "crowd3" else ()) for worker in workers])
    assert plan == (Placement("crowd3", 10, 20),)


# --- lines


def lines(workers: Sequence[WorkerView], far: Sequence[str], seconds: float) -> Links:
    """Workers measured their lines: to and from far ones a round trip of so many seconds, to others 2 ms."""
    pairs = [(one.peer_id, other.peer_id) for one in workers for other in workers if one is not other]
    return Links({pair: Link(seconds if set(pair) & set(far) else 0.002, 1e9) for pair in pairs})


def test_the_chain_goes_through_near_workers() -> None:
    workers = [measured(f"w{index}", 100, 0.01) for index in range(4)]
    plan = place(uniform(20), workers, lines(workers, ["w0", "w1"], 4.0))
    near = {p.peer_id: p.end - p.start for p in plan}
    assert near["w2"] == near["w3"] == 10
    slow = [replace(worker, decode_s=1.0 if worker.peer_id == "w3" else 0.01) for worker in workers]
    chain = [p for p in place(uniform(20), slow[1:], lines(slow, ["w1"], 0.2)) if p.peer_id != "w3"]
    assert {p.peer_id for p in chain} == {"w1", "w2"}, "a far one is nearer than a slow one"


def test_where_lines_cost_more_than_layers_there_are_fewer_stages() -> None:
    """One machine could hold the whole model, and two others would help it with a third each."""
    workers = [measured("large", 400, 0.01), *(measured(f"w{index}", 130, 0.01) for index in range(2))]
    names = [worker.peer_id for worker in workers]
    for rtt_s, whole in ((0.002, False), (4.0, True)):
        plan = place(uniform(40), workers, lines(workers, names, rtt_s))
        assert ("large" in {p.peer_id for p in plan if p.end - p.start == 40}) == whole


def test_nobody_is_made_to_look_far_away_by_others() -> None:
    workers = [measured(f"w{index}", 100, 0.01) for index in range(3)]
    honest = {("w0", "w1"): Link(0.01, 1e9), ("w1", "w0"): Link(0.01, 1e9)}
    lies = {("w2", "w0"): Link(100.0, 1e9), ("w2", "w1"): Link(100.0, 1e9)}
    links = Links(honest | lies, hop_bytes=0)
    assert [links.usual_hop_s(worker) for worker in workers] == [0.005, 0.005, pytest.approx(50)]


def test_a_line_that_was_not_measured_is_as_long_as_its_ends_are_far() -> None:
    """Three edges of a city and one of the next: lines to that take 100 ms more."""
    workers = [measured(f"w{index}", 100, 0.01) for index in range(4)]
    rtts = {("w0", "w1"): 0.01, ("w1", "w0"): 0.01, ("w2", "w0"): 0.01, ("w3", "w0"): 0.11}
    links = Links({pair: Link(rtt_s, 1e9) for pair, rtt_s in rtts.items()}, hop_bytes=0)
    assert links.link(workers[1], workers[2]).rtt_s == pytest.approx(0.01)
    assert links.link(workers[1], workers[3]).rtt_s == links.link(workers[3], workers[2]).rtt_s == pytest.approx(0.11)
