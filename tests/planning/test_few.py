"""Small swarms: plans against every plan there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planning import ModelShape, WorkerView, place
from benchmarks.machines import large_model, machines
from tests.planning.swarms import Range, after, assert_fits, flow, uniform


def safety(n_layers: int, workers: Sequence[WorkerView], held: Mapping[str, Range]) -> int:
    """By the definition: how safe the least safe layer is."""
    found = 3
    for layer in range(n_layers):
        holders = [w for w in workers if w.peer_id in held and held[w.peer_id][0] <= layer < held[w.peer_id][1]]
        networks = {worker.network or worker.peer_id for worker in holders}
        found = min(found, len(holders) if len(holders) < 2 else 2 if len(networks) < 2 else 3)
    return found


def all_plans(shape: ModelShape, workers: Sequence[WorkerView]) -> Iterator[dict[str, Range]]:
    """Every way to give idle workers ranges that fit and to which no layer can be added, as to hold more is no loss."""
    every = list(combinations(range(shape.n_layers + 1), 2))
    menus: list[list[Range | None]] = []
    for worker in workers:
        fitting = [each for each in every if shape.stage_bytes(*each) <= worker.vram]
        widest = [r for r in fitting if not any(o != r and o[0] <= r[0] and r[1] <= o[1] for o in fitting)]
        menus.append([worker.held] if worker.held else [*widest] or [None])
    for chosen in product(*menus):
        yield {worker.peer_id: range_ for worker, range_ in zip(workers, chosen, strict=True) if range_}


@st.composite
def small_swarms(draw: st.DrawFn) -> tuple[ModelShape, list[WorkerView]]:
    """Idle workers; four of them for three layers, or three for five."""
    n_layers = draw(st.integers(1, 5))
    shape = uniform(n_layers, draw(st.integers(0, 15)), draw(st.integers(0, 15)))
    are_measured = draw(st.booleans())
    machine = st.tuples(
        st.integers(5, 80), st.sampled_from([0.002, 0.01, 0.013, 0.03]), st.sampled_from(["", "", "a", "b"])
    )
    machines = draw(st.lists(machine, min_size=1, max_size=4 if n_layers <= 3 else 3))
    return shape, [
        WorkerView(f"w{index}", vram, network=network, decode_s=seconds if are_measured else 0.0)
        for index, (vram, seconds, network) in enumerate(machines)
    ]


def assert_best(shape: ModelShape, workers: Sequence[WorkerView]) -> None:
    plan = place(shape, workers)
    assert_fits(shape, workers, plan)
    plans = [(safety(shape.n_layers, workers, held), held) for held in all_plans(shape, workers)]
    safest = max(safe for safe, _ in plans)
    found = {worker.peer_id: worker.held for worker in after(workers, plan) if worker.held}
    if not safest:
        assert plan == ()
        return
    assert safety(shape.n_layers, workers, found) == safest
    others = [[replace(w, held=held.get(w.peer_id)) for w in workers] for safe, held in plans if safe == safest]
    assert flow(shape.n_layers, after(workers, plan)) >= 0.998 * max(flow(shape.n_layers, other) for other in others)
    assert place(shape, after(workers, plan)) == ()


@settings(max_examples=150)
@given(small_swarms())
def test_no_plan_is_better(swarm: tuple[ModelShape, list[WorkerView]]) -> None:
    """Objective: the safety of the least safe layer, then tokens per second in parts of what workers hold."""
    assert_best(*swarm)


@settings(max_examples=100)
@given(small_swarms(), st.data())
def test_no_plan_for_newcomers_is_better(swarm: tuple[ModelShape, list[WorkerView]], data: st.DataObject) -> None:
    """Beside workers that hold all layers once and run jobs, so that nobody moves."""
    shape, workers = swarm
    middle = data.draw(st.integers(1, shape.n_layers))
    held = [(0, middle), *([(middle, shape.n_layers)] if middle < shape.n_layers else [])]
    seconds = workers[0].decode_s
    running = [
        WorkerView(f"h{index}", 10_000, held=range_, ready=True, jobs=1, decode_s=seconds)
        for index, range_ in enumerate(held)
    ]
    assert_best(shape, [*running, *workers[:2]])


@pytest.mark.parametrize(
    ("count", "seed", "best"),
    [(6, 2, 150.0), (8, 2, 195.7), (12, 4, 343.8), (12, 6, 359.8), (12, 9, 356.9), (16, 4, 516.8), (20, 4, 650.2)],
)
def test_larger_swarms_come_near_the_best_that_is_known(count: int, seed: int, best: float) -> None:
    """Tokens per second through 32 layers, found in twenty times the time or more (docs/performance.md)."""
    shape, workers = large_model(32), machines(count, seed)
    plan = place(shape, workers)
    assert_fits(shape, workers, plan)
    assert flow(32, after(workers, plan)) >= 0.95 * best


def test_newcomers_are_placed_around_those_who_stay() -> None:
    """A quarter of the workers have just come; who holds layers keeps them, and the plan is near one made anew."""
    shape, workers = large_model(32), machines(16, seed=2)
    anew = place(shape, workers)
    loaded = after(workers, anew)
    running = [replace(w, held=None, ready=False) if index % 4 == 3 else w for index, w in enumerate(loaded)]
    plan = place(shape, running)
    assert {placement.peer_id for placement in plan} == {w.peer_id for w in running if w.held is None}
    assert flow(32, after(running, plan)) >= 0.99 * flow(32, after(workers, anew))
