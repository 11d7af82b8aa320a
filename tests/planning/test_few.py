"""Small swarms: plans against every plan there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planning import Links, ModelShape, WorkerView, place
from azu.planning.few import Score
from azu.planning.snapshot import powers
from tests.planning.swarms import Range, after, assert_fits, uniform


def smallest_cut(n_layers: int, edges: Sequence[tuple[Range, float]]) -> float:
    """By Menger's theorem what can flow: the least that leads out of any set of borders with 0 and without the end."""
    cuts = (set(inner) | {0} for size in range(n_layers) for inner in combinations(range(1, n_layers), size))
    return min(sum(rate for (start, end), rate in edges if start in cut and end not in cut) for cut in cuts)


def score(n_layers: int, workers: Sequence[WorkerView], held: Mapping[str, Range]) -> Score:
    """By the definition: how safe the least safe layer is, and how many tokens can flow, hops counted."""
    power = powers(workers, Links())
    safety = 3
    for layer in range(n_layers):
        holders = [w for w in workers if w.peer_id in held and held[w.peer_id][0] <= layer < held[w.peer_id][1]]
        networks = {worker.network or worker.peer_id for worker in holders}
        safety = min(safety, len(holders) if len(holders) < 2 else 2 if len(networks) < 2 else 3)
    edges = [(range_, power[peer_id].rate(range_[1] - range_[0], n_layers)) for peer_id, range_ in held.items()]
    return Score(safety, smallest_cut(n_layers, edges))


def all_plans(shape: ModelShape, workers: Sequence[WorkerView]) -> Iterator[dict[str, Range]]:
    """Every way to give idle workers ranges that fit, or none."""
    every = list(combinations(range(shape.n_layers + 1), 2))
    menus = [
        [worker.held] if worker.held else [None, *(each for each in every if shape.stage_bytes(*each) <= worker.vram)]
        for worker in workers
    ]
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
    scores = [score(shape.n_layers, workers, held) for held in all_plans(shape, workers)]
    found = {worker.peer_id: worker.held for worker in after(workers, plan) if worker.held}
    if all(each.safety == 0 for each in scores):
        assert plan == ()
        return
    mine = score(shape.n_layers, workers, found)
    assert not [each for each in scores if each.beats(mine)]
    assert place(shape, after(workers, plan)) == ()


@settings(max_examples=150)
@given(small_swarms())
def test_no_plan_is_better(swarm: tuple[ModelShape, list[WorkerView]]) -> None:
    """Objective: the safety of the least safe layer, then tokens per second with hops counted."""
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
