"""Ranges by what they are worth, against all ranges that fit, and the sums that this rests on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.planning import Links, ModelShape, WorkerView, place
from azu.planning.levels import Levels
from azu.planning.snapshot import powers
from benchmarks.machines import large_model, machines
from tests.planning.swarms import LAYER, Range, after, sized, uniform


def levels_of(shape: ModelShape, workers: Sequence[WorkerView]) -> Levels:
    found = Levels(shape, workers, powers(workers, Links()))
    for worker in workers:
        if worker.held:
            found.put(worker, worker.held)
    return found


@given(st.lists(st.integers(5, 20), min_size=1, max_size=9) | st.integers(1, 12).map(lambda n: [LAYER] * n), st.data())
def test_a_worker_is_given_as_much_as_fits_where_nobody_is(layers: list[int], data: st.DataObject) -> None:
    shape = sized(layers, data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30)))
    worker = WorkerView("w", data.draw(st.integers(1, 150)), decode_s=0.01)
    fitting = [r for r in combinations(range(shape.n_layers + 1), 2) if shape.stage_bytes(*r) <= worker.vram]
    best = levels_of(shape, [worker]).best(worker)
    assert (best is not None) == bool(fitting)
    if best is not None:
        assert best in fitting
        assert best[1] - best[0] == max(end - start for start, end in fitting), "the most layers, which then are safer"


@given(st.data())
def test_who_comes_and_goes_leaves_no_trace(data: st.DataObject) -> None:
    """Rates of all sizes, in any order: sums of floats would differ in their last bits."""
    n_layers = data.draw(st.integers(1, 9))
    pairs = st.sampled_from(list(combinations(range(n_layers + 1), 2)))
    workers = [
        WorkerView(f"w{index}", 1_000, held=data.draw(pairs), decode_s=data.draw(st.floats(1e-4, 1.0)),
                   network=data.draw(st.sampled_from(["", "a"])))
        for index in range(data.draw(st.integers(1, 6)))
    ]  # fmt: skip
    levels, other = levels_of(uniform(n_layers), workers), levels_of(uniform(n_layers), workers[::-1])
    for worker in data.draw(st.permutations(workers)):
        levels.put(worker, levels.take(worker))
    assert (levels.tokens, levels.ways) == (other.tokens, other.ways)
    assert [levels.safety(n) for n in range(n_layers)] == [other.safety(n) for n in range(n_layers)]
    newcomer = WorkerView("w0", 40, decode_s=0.01)
    for each in levels, other:
        each.take(workers[0])
    assert levels.best(newcomer) == other.best(newcomer)


def test_a_range_that_meets_others_is_preferred_and_one_that_is_needed_more_so() -> None:
    running = [WorkerView(f"h{index}", 10_000, held=held, decode_s=0.01, network=str(index)) for index, held in
               enumerate([(0, 10), (0, 10), (10, 24), (10, 24), (0, 24)])]  # fmt: skip
    newcomer = WorkerView("new", 110, decode_s=0.01)
    levels = levels_of(uniform(24), [*running, newcomer])
    met: Range | None = levels.best(newcomer)
    assert met is not None
    assert {met[0], met[1]} & {0, 10, 24}
    strong = [WorkerView(f"s{index}", 10_000, held=(0, 20), decode_s=0.001) for index in range(4)]
    assert levels_of(uniform(24), [*running, *strong, newcomer]).best(newcomer) == (13, 24)


@pytest.mark.parametrize(("count", "n_layers", "share"), [(24, 32, 0.93), (60, 32, 0.95), (100, 80, 0.95)])
def test_layers_have_nearly_all_that_workers_could_give(count: int, n_layers: int, share: float) -> None:
    """In the mean, where no layer counts for more than all would have, against what no placement can exceed."""
    shape, workers = large_model(n_layers), machines(count, seed=3)
    ideal = levels_of(shape, workers)
    bound = sum(ideal.most(w.peer_id) * ideal.rate(w.peer_id, ideal.most(w.peer_id)) for w in workers) / n_layers
    found = levels_of(shape, after(workers, place(shape, workers)))
    assert found.worth() * 1e9 >= share * bound
    assert min(found.tokens) >= 0.7 * bound
