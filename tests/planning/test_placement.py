"""Placement against brute force on small instances, and its promises on larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planning import ModelShape, Placement, WorkerView, holes, place
from tests.planning.swarms import (
    LAYER,
    Range,
    after,
    assert_covers_once,
    assert_fits,
    cuts,
    flow,
    holding,
    idle,
    primary,
    ranges,
    route,
    sized,
    uniform,
)


def best_by_brute_force(shape: ModelShape, workers: Sequence[WorkerView]) -> tuple[int, int] | None:
    """(fewest stages, then the smallest largest stage in layers), or None if the model cannot be covered."""
    for stages in range(1, min(len(workers), shape.n_layers) + 1):
        largest = [
            max(end - start for start, end in chain)
            for chain in cuts(shape.n_layers, stages)
            for chosen in permutations(workers, stages)
            if all(shape.stage_bytes(*part) <= worker.vram for part, worker in zip(chain, chosen, strict=True))
        ]
        if largest:
            return stages, min(largest)
    return None


# --- a plan from nothing


@settings(max_examples=300)
@given(
    n_layers=st.integers(1, 6),
    embedding=st.integers(0, 35),
    head=st.integers(0, 35),
    vrams=st.lists(st.integers(0, 75), max_size=4),
)
def test_fewest_workers_and_the_smallest_largest_stage(
    n_layers: int, embedding: int, head: int, vrams: list[int]
) -> None:
    """Exact wherever a model's layers are of one size, whatever its ends weigh and however workers differ."""
    shape, workers = uniform(n_layers, embedding, head), idle(*vrams)
    plan = place(shape, workers)
    best = best_by_brute_force(shape, workers)
    if best is None:
        assert plan == ()
        return
    chain = primary(shape, workers)
    assert_fits(shape, workers, plan)
    assert_covers_once(n_layers, chain)
    assert (len(chain), max(p.end - p.start for p in chain)) == best


@settings(max_examples=50)
@given(
    layers=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    embedding=st.integers(0, 100),
    head=st.integers(0, 100),
    vrams=st.lists(st.integers(0, 300), max_size=30),
)
def test_any_plan_covers_every_layer_once_within_memory(
    layers: list[int], embedding: int, head: int, vrams: list[int]
) -> None:
    shape, workers = sized(layers, embedding, head), idle(*vrams)
    plan = place(shape, workers)
    assert_fits(shape, workers, plan)
    if plan:
        assert_covers_once(len(layers), primary(shape, workers))
        assert not holes(len(layers), [(each.start, each.end) for each in plan])
        assert place(shape, workers) == plan
        assert place(shape, workers[::-1]) == plan


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(0, 50), st.integers(0, 50), st.lists(st.integers(70, 400), min_size=60))
def test_a_swarm_with_room_enough_is_always_planned(n_layers: int, embedding: int, head: int, vrams: list[int]) -> None:
    """Sixty workers that each hold one layer and both ends' weight cover anything up to sixty layers."""
    assert place(uniform(n_layers, embedding, head), idle(*vrams))


def test_the_ends_go_to_workers_that_can_hold_them() -> None:
    # In order of memory the small one would come last, where the head does not fit it.
    plan = place(uniform(9, embedding=35, head=35), idle(75, 75, 10))
    assert [(p.peer_id, p.start, p.end) for p in plan] == [("w0", 0, 4), ("w2", 4, 5), ("w1", 5, 9)]


def test_a_swarm_of_equals_is_loaded_evenly() -> None:
    assert ranges(place(uniform(30), idle(120, 120, 120))) == [(0, 10), (10, 20), (20, 30)]
    assert ranges(place(uniform(30), idle(1_000))) == [(0, 30)]


def test_too_little_memory_is_no_plan() -> None:
    assert place(uniform(10), []) == ()
    assert place(uniform(10), idle(49, 50)) == ()
    assert place(uniform(10), idle(9, 9, 9)) == ()
    assert len(place(uniform(10), idle(50, 50))) == 2


def test_a_restart_of_the_swarm_moves_nothing() -> None:
    cached = [(20, 30), (0, 10), (10, 20)]
    workers = [WorkerView(f"w{index}", 100, cached=(range_,)) for index, range_ in enumerate(cached)]
    assert {(p.peer_id, p.start, p.end) for p in place(uniform(30), workers)} == {
        (f"w{index}", *range_) for index, range_ in enumerate(cached)
    }


# --- a swarm that runs already


@given(st.lists(st.integers(1, 11), unique=True, max_size=5).map(sorted), st.data())
def test_nothing_changes_once_the_model_is_covered(inner: list[int], data: st.DataObject) -> None:
    chain = list(zip([0, *inner], [*inner, 12], strict=True))
    spare = data.draw(st.lists(st.sampled_from(chain), max_size=3))
    workers = [holding(f"w{index}", *range_, ready=data.draw(st.booleans())) for index, range_ in
               enumerate([*chain, *spare])]  # fmt: skip
    assert place(uniform(12), workers) == ()


@settings(max_examples=40)
@given(
    n_layers=st.integers(1, 20),
    vrams=st.lists(st.integers(0, 150), max_size=8),
    embedding=st.integers(0, 30),
    head=st.integers(0, 30),
)
def test_carrying_a_plan_out_leaves_nothing_to_do(n_layers: int, vrams: list[int], embedding: int, head: int) -> None:
    shape, workers = uniform(n_layers, embedding, head), idle(*vrams)
    plan = place(shape, workers)
    done = after(workers, plan)
    assert place(shape, done) == ()
    chain = route(n_layers, done, tokens=10)
    assert (chain is not None) == bool(plan)
    if chain is not None:
        assert_covers_once(n_layers, chain)


def test_a_hole_is_filled_by_an_idle_worker_and_nobody_moves() -> None:
    workers = [holding("a", 0, 10), holding("c", 20, 30), *idle(100)]
    assert place(uniform(30), workers) == (Placement("w0", 10, 20),)


def test_a_large_hole_is_filled_before_a_small_one() -> None:
    """Else the only worker that could fill the large one would be given the small one, and all would have to move."""
    workers = [holding("a", 1, 10), holding("b", 15, 20), WorkerView("big", 50), WorkerView("small", 10)]
    plan = place(uniform(20), workers)
    assert {(p.peer_id, p.start, p.end) for p in plan} == {("big", 10, 15), ("small", 0, 1)}


@given(st.data())
def test_holes_are_filled_without_moving_anybody_or_all_is_planned_anew(data: st.DataObject) -> None:
    n_layers = data.draw(st.integers(2, 12))
    shape = uniform(n_layers, data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20)))
    pairs = st.tuples(st.integers(0, n_layers), st.integers(0, n_layers)).filter(lambda pair: pair[0] < pair[1])
    held = data.draw(st.lists(pairs, max_size=3))
    running = [holding(f"h{index}", *range_, vram=shape.stage_bytes(*range_)) for index, range_ in enumerate(held)]
    workers = running + idle(*data.draw(st.lists(st.integers(0, 100), max_size=4)))
    plan = place(shape, workers)
    assert_fits(shape, workers, plan)
    if not plan:
        return
    assert not holes(n_layers, [w.held for w in after(workers, plan) if w.held])
    moved = [placement for placement in plan if placement.peer_id.startswith("h")]
    for placement in moved:
        assert dict(zip([w.peer_id for w in running], held, strict=True))[placement.peer_id] != (
            placement.start, placement.end,
        )  # fmt: skip
    if moved:  # only where somebody had to: what is held (ranges may overlap) is no chain yet
        assert route(n_layers, after(running, ()), tokens=1) is None


def test_all_is_planned_anew_where_idle_workers_do_not_suffice() -> None:
    workers = [holding("a", 0, 10, vram=100), holding("b", 5, 15, vram=100), *idle(100)]
    plan = place(uniform(30), workers)
    assert_covers_once(30, sorted([*plan, Placement("a", 0, 10)], key=lambda p: p.start))
    assert all(placement.peer_id != "a" for placement in plan), "a holds what the new plan gives it"


def test_a_spare_fills_a_hole_before_all_is_planned_anew() -> None:
    running = [
        holding("a", 0, 10, vram=120, ready=True, jobs=2, decode_s=0.001),
        holding("b", 10, 20, vram=120, ready=True, jobs=2, decode_s=0.004),
        holding("c", 0, 10, vram=120, ready=True, decode_s=0.002),
    ]
    assert place(uniform(30), running) == (Placement("c", 20, 30),)
    between = [*running[:2], replace(running[2], held=(3, 13))]
    assert place(uniform(30), between) == (Placement("c", 20, 30),), "two others hold its layers between them"
    busy = [*running[:2], replace(running[2], jobs=1)]
    assert {placement.peer_id for placement in place(uniform(30), busy)} != {"c"}


def test_a_hole_is_filled_along_the_cuts_of_running_jobs() -> None:
    workers = [
        holding("a", 20, 30, vram=120, ready=True, decode_s=0.002),
        WorkerView("b", 120, decode_s=0.001),
        WorkerView("c", 120, decode_s=0.002),
    ]
    for cut in (9, 10, 12):
        assert ranges(place(uniform(30), workers, cuts=[(0, cut), (cut, 20), (20, 30)])) == [(0, cut), (cut, 20)]
    # Of cuts that overlap, the first one counts.
    assert ranges(place(uniform(30), workers, cuts=[(0, 11), (0, 9), (9, 20)])) == [(0, 11), (11, 20)]
    # Nobody has room for such stages, and so the model comes first.
    assert ranges(place(uniform(30), workers, cuts=[(0, 14), (14, 20)])) == [(0, 12), (12, 20)]


@given(st.data())
def test_whatever_jobs_run_a_plan_covers_the_model_and_is_the_last(data: st.DataObject) -> None:
    pairs = st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda pair: pair[0] < pair[1])
    small = pairs.filter(lambda pair: pair[1] - pair[0] <= 6)
    running = [
        holding(f"h{index}", *range_, vram=60, ready=True, jobs=data.draw(st.integers(0, 1)))
        for index, range_ in enumerate(data.draw(st.lists(small, max_size=4)))
    ]
    workers = running + idle(*data.draw(st.lists(st.integers(0, 100), max_size=4)))
    jobs = data.draw(st.lists(pairs, max_size=5))
    plan = place(uniform(12), workers, cuts=jobs)
    assert_fits(uniform(12), workers, plan)
    if plan:
        then = after(workers, plan)
        assert not holes(12, [worker.held for worker in then if worker.held])
        assert place(uniform(12), then, cuts=jobs) == ()


@pytest.mark.parametrize("claimed", [(0, 1_000), (31, 40), (5, 5), (9, 3), (30, 31)])
def test_claims_of_layers_that_do_not_exist_are_worth_nothing(claimed: Range) -> None:
    liar = WorkerView("liar", 10_000, held=claimed, ready=True, kv_tokens_free=100)
    plan = place(uniform(30), [liar, *idle(300, 300)])
    assert ranges(plan) == [(0, 30), (0, 30)]
    assert route(30, [liar], 1) is None
    assert holes(30, [claimed]) == ((0, 30),)


# --- replicas


def test_idle_workers_hold_replicas_of_what_hangs_on_the_fewest() -> None:
    workers = [holding("a", 0, 10), holding("b", 10, 20), holding("c", 10, 20), *idle(100, 100, 100)]
    plan = place(uniform(20), workers)
    assert [(p.start, p.end) for p in plan] == [(0, 10), (0, 10), (10, 20)]


def test_a_replica_fits_and_prefers_what_is_cached() -> None:
    shape = uniform(20, embedding=50)
    running = [holding("a", 0, 10), holding("b", 10, 20)]
    for vram, most in ((149, 14), (99, 9)):
        (given_out,) = place(shape, [*running, *idle(vram)])
        assert given_out.start > 0
        assert given_out.end - given_out.start == most
    cached = WorkerView("w", 150, cached=((4, 18),))
    assert place(shape, [*running, cached]) == (Placement("w", 4, 18),)


@settings(max_examples=30)
@given(st.integers(2, 20), st.integers(1, 12))
def test_replicas_even_out_how_many_tokens_the_stages_have(n_layers: int, spare: int) -> None:
    """About as many tokens as where a stage of twice as many layers gets about twice as many workers."""
    half = n_layers // 2
    running = [holding("a", 0, half), holding("b", half, n_layers)]
    workers = [*running, *idle(*[(n_layers - half) * LAYER] * spare)]
    best = 0.0
    for count in range(spare + 1):
        split = [(0, half)] * count + [(half, n_layers)] * (spare - count)
        given_so = [Placement(f"w{index}", *range_) for index, range_ in enumerate(split)]
        best = max(best, flow(n_layers, after(workers, given_so)))
    assert flow(n_layers, after(workers, place(uniform(n_layers), workers))) >= 0.999 * best


# --- holes


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(-2, 14), st.integers(-2, 14)), max_size=6))
def test_holes_are_exactly_the_layers_that_nobody_covers(n_layers: int, held: list[Range]) -> None:
    covered = {layer for start, end in held if 0 <= start < end <= n_layers for layer in range(start, end)}
    found = holes(n_layers, held)
    assert [layer for start, end in found for layer in range(start, end)] == [
        layer for layer in range(n_layers) if layer not in covered
    ]
    assert all(one[1] < other[0] for one, other in pairwise(found)), "holes touch"


def test_the_brute_force_itself() -> None:
    assert best_by_brute_force(uniform(4), idle(20, 20, 20)) == (2, 2)
    assert best_by_brute_force(uniform(4, head=10), idle(20, 20, 20)) == (3, 2)
    assert best_by_brute_force(uniform(4), idle(10, 10, 10)) is None
    assert [len(list(cuts(5, stages))) for stages, _ in product(range(1, 6), [0])] == [1, 4, 6, 4, 1]
