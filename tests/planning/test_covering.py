"""Who makes all layers safe, against everything that workers could hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planning import Links, ModelShape, WorkerView
from azu.planning.covering import secure
from azu.planning.rating import Rater
from azu.planning.snapshot import powers
from azu.planning.steps import finish
from benchmarks.machines import large_model, machines
from tests.planning.swarms import Range, uniform


def rater_of(shape: ModelShape, workers: Sequence[WorkerView]) -> Rater:
    return Rater(shape, workers, powers(workers, Links()))


def is_safe(n_layers: int, workers: Sequence[WorkerView], held: Mapping[str, Range], spread: bool) -> bool:
    """By the definition: two workers, or workers of two networks, hold each layer."""
    groups = {w.peer_id: (w.network or w.peer_id) if spread else w.peer_id for w in workers}
    there = [{groups[peer] for peer, (start, end) in held.items() if start <= layer < end} for layer in range(n_layers)]
    return all(len(each) >= 2 for each in there)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[ModelShape, list[WorkerView]]:
    """Five workers at most, of which some hold layers."""
    n_layers = draw(st.integers(1, 6))
    pairs = st.tuples(st.integers(0, n_layers - 1), st.integers(1, n_layers)).filter(lambda pair: pair[0] < pair[1])
    machine = st.tuples(st.integers(5, 70), st.sampled_from(["", "a", "b"]), st.none() | st.none() | pairs)
    drawn = draw(st.lists(machine, min_size=1, max_size=5))
    shape = uniform(n_layers, draw(st.integers(0, 15)), draw(st.integers(0, 15)))
    return shape, [
        WorkerView(f"w{n}", vram, network=network, held=held) for n, (vram, network, held) in enumerate(drawn)
    ]


@settings(max_examples=200)
@given(swarms(), st.booleans())
def test_it_is_found_where_there_is_any(swarm: tuple[ModelShape, list[WorkerView]], spread: bool) -> None:
    shape, workers = swarm
    rater = rater_of(shape, workers)
    held = {worker.peer_id: worker.held for worker in workers if worker.held}
    free = [worker.peer_id for worker in workers if not worker.held]
    found = finish(secure(rater, held, free, spread=spread))
    if found is not None:
        assert found.keys() <= set(free)
        assert all(range_ in rater.windows[peer_id] for peer_id, range_ in found.items())
        assert is_safe(shape.n_layers, workers, {**held, **found}, spread)
        return
    for ranges in product(*(rater.windows[peer_id] for peer_id in free if rater.windows[peer_id])):
        able = [peer_id for peer_id in free if rater.windows[peer_id]]
        assert not is_safe(shape.n_layers, workers, {**held, **dict(zip(able, ranges, strict=True))}, spread)


@pytest.mark.parametrize("count", [8, 12, 24, 100])
def test_it_gives_up_soon_and_in_small_steps(count: int) -> None:
    """Workers that could hold all layers once and a half, or twice by a hair."""
    workers = machines(count, seed=2)
    rater = rater_of(large_model(32), workers)
    layers = sum(rater.most(worker.peer_id) for worker in workers)
    for n_layers in (layers // 2 - 1, layers * 2 // 3):
        rater = rater_of(large_model(max(1, n_layers)), workers)
        steps = secure(rater, {}, [worker.peer_id for worker in workers], spread=True)
        assert sum(1 for _ in steps) <= 100
