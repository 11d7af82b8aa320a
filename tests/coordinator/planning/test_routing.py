"""Routes against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.models.memory import MAX_JOBS
from coordinator.planning import Placement, WorkerView, route
from tests.coordinator.planning.swarms import Range, assert_covers_once, holding


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
