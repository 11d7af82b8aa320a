"""Coverage against a count done the slow way, and what records may lie about."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from azu.dht.coverage import models_of, names_of
from azu.dht.models import coverage_bar, models_document
from azu.records import HeldRange
from tests.dht.records import MANIFEST, MODEL, coordinator, held, offer, snapshot, worker

OTHER = "cd" * 32
RANGES = st.builds(
    held,
    st.integers(0, 130),
    st.integers(0, 1000),
    st.sampled_from(["loaded", "loading", "cached"]),
    st.sampled_from([MANIFEST, OTHER]),
)
SWARMS = st.lists(st.lists(RANGES, max_size=6), max_size=14)


def counted(swarm: list[list[HeldRange]], layer: int, state: str) -> int:
    return sum(
        any(r.manifest == MANIFEST and r.state == state and r.start <= layer < r.end for r in ranges)
        for ranges in swarm
    )


@given(SWARMS, st.integers(0, 126))
def test_replicas_are_counted_by_worker_and_layer(swarm: list[list[HeldRange]], n_layers: int) -> None:
    workers = [worker(number, *ranges) for number, ranges in enumerate(swarm, 1)]
    views = models_of(snapshot(*workers, coordinator(99, offer(n_layers))))
    (view,) = [view for view in views if view.model_id == MODEL]
    assert view.replicas == tuple(counted(swarm, layer, "loaded") for layer in range(n_layers))
    assert view.loading == tuple(counted(swarm, layer, "loading") > 0 for layer in range(n_layers))
    uncovered = [layer for start, end in view.missing for layer in range(start, end)]
    assert uncovered == [layer for layer, count in enumerate(view.replicas) if count == 0]
    assert all(before[1] < after[0] for before, after in pairwise(view.missing))
    assert view.is_complete == (n_layers > 0 and not uncovered)
    assert sum(view.workers.values()) <= len(workers)


@given(SWARMS, st.integers(1, 126), st.integers(0, 300))
def test_the_bar_has_one_mark_a_layer(swarm: list[list[HeldRange]], n_layers: int, width: int) -> None:
    workers = [worker(number, *ranges) for number, ranges in enumerate(swarm, 1)]
    views = models_of(snapshot(*workers, coordinator(99, offer(n_layers))))
    (view,) = [view for view in views if view.model_id == MODEL]
    lines = coverage_bar(view, width).plain.split("\n")
    marks = ""
    for line in lines:
        assert int(line[:3]) == len(marks)
        assert len(line) <= max(width, 15)
        assert len(line) <= 4 + 54
        marks += line[4:].replace(" ", "")
    assert len(marks) == n_layers
    for mark, count, loading in zip(marks, view.replicas, view.loading, strict=True):
        assert mark == (("~" if loading else ".") if count == 0 else "+" if count > 9 else str(count))


def test_a_large_model_with_holes() -> None:
    workers = [worker(1, held(0, 60)), worker(2, held(50, 100)), worker(3, held(100, 110, "loading"), held(0, 20))]
    (view,) = models_of(snapshot(*workers, coordinator(9, offer(126))))
    assert view.missing == ((100, 126),)
    assert view.workers == {"loaded": 3, "loading": 0, "cached": 0}  # each in its best state
    assert coverage_bar(view, 66).plain.splitlines() == [
        "  0 2222222222 2222222222 1111111111 1111111111 1111111111",
        " 50 2222222222 1111111111 1111111111 1111111111 1111111111",
        "100 ~~~~~~~~~~ .......... ......",
    ]


def test_more_than_nine_are_a_plus() -> None:
    workers = [worker(number, held(0, 1)) for number in range(1, 13)]
    (view,) = models_of(snapshot(*workers, coordinator(99, offer(2))))
    assert coverage_bar(view, 80).plain == "  0 +."


def test_a_model_without_a_coordinator_has_no_name_and_no_end() -> None:
    (view,) = models_of(snapshot(worker(1, held(2, 5))))
    assert (view.model_id, view.n_layers, view.is_complete) == (None, None, False)
    assert view.replicas == (0, 0, 1, 1, 1)
    (entry,) = models_document(snapshot(worker(1, held(2, 5))))["models"]
    assert entry["missing"] == [{"start": 0, "end": 2}]


def test_backward_and_overlong_ranges_count_for_nothing_beyond_the_model() -> None:
    (view,) = models_of(snapshot(worker(1, held(9, 3), held(28, 1000)), coordinator(9, offer(30))))
    assert view.replicas == (0,) * 28 + (1, 1)
    (view,) = models_of(snapshot(worker(1, held(9, 3)), coordinator(9, offer(0))))
    assert (view.replicas, view.is_complete) == ((), False)
    assert view.workers == {"loaded": 0, "loading": 0, "cached": 0}


def test_coordinators_that_disagree_are_told_apart() -> None:
    seen = snapshot(coordinator(1, offer()), coordinator(2, offer()), coordinator(3, offer(4, "Impostor")))
    assert [(view.model_id, view.n_layers, len(view.offered_by)) for view in models_of(seen)] == [
        ("Impostor", 4, 1),
        (MODEL, 30, 2),
    ]
    assert names_of(seen) == {}
    assert names_of(snapshot(coordinator(1, offer()), coordinator(2, offer()))) == {MANIFEST: MODEL}
