"""Workers in a row for layers that a job has lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from azu.identity import Identity
from azu.planning import Links, WorkerView, holes
from azu.tickets import StageEntry
from coordinator.planning import cut_anew
from tests.planning.swarms import Range

PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(1, 20)]


def stages_of(*borders: int, paid_from: Sequence[int] = ()) -> list[StageEntry]:
    paid = [*paid_from, *[0] * len(borders)]
    return [
        StageEntry(peer_id=PEERS[index], start=start, end=end, paid_from=paid[index])
        for index, (start, end) in enumerate(pairwise(borders))
    ]


def ready(number: int, held: Range, **changes: object) -> WorkerView:
    return WorkerView(PEERS[number], 1, held=held, ready=True, kv_tokens_free=100, **changes)  # type: ignore[arg-type]


def cut(
    stages: Sequence[StageEntry], lost: set[int], workers: Sequence[WorkerView], without: set[str] = frozenset()
) -> tuple[StageEntry, ...] | None:
    return cut_anew(stages, lost, workers, 10, without=without, links=Links(), prompt=5)


def ranges(stages: Sequence[StageEntry] | None) -> list[tuple[int, int, int]] | None:
    return stages and [(PEERS.index(stage.peer_id), stage.start, stage.end) for stage in stages]


def test_two_in_a_row_take_a_stage_and_others_keep_theirs() -> None:
    stages = stages_of(0, 3, 9, 12)
    near = [ready(5, (1, 7)), ready(6, (6, 12))]
    found = cut(stages, {1}, near)
    assert found is not None
    assert (found[0], found[-1]) == (stages[0], stages[2])
    assert ranges(found) in ([(0, 0, 3), (5, 3, border), (6, border, 9), (2, 9, 12)] for border in (6, 7))
    assert cut(stages, {1}, near[:1]) is None
    assert cut(stages, {1}, near, {PEERS[6]}) is None
    assert cut(stages, {1}, [ready(0, (0, 12)), ready(2, (0, 12))]) is None, "each has a stage of the job already"


def test_stages_side_by_side_are_one_stretch_where_the_same_is_paid_for_them() -> None:
    workers = [ready(5, (3, 12))]
    assert ranges(cut(stages_of(0, 3, 9, 12), {1, 2}, workers)) == [(0, 0, 3), (5, 3, 12)]
    assert cut(stages_of(0, 3, 9, 12, paid_from=(0, 4)), {1, 2}, workers) is None
    again = cut(stages_of(0, 3, 9, 12, paid_from=(0, 4)), {1, 2}, [*workers, ready(6, (9, 12))])
    assert again is not None
    assert [stage.paid_from for stage in again] == [0, 4, 0]


def test_who_has_faults_is_taken_where_it_has_to_be() -> None:
    stages = stages_of(0, 3, 9)
    workers = [ready(5, (3, 6)), ready(6, (6, 9)), ready(7, (3, 9), faults=1)]
    assert ranges(cut(stages, {1}, workers)) == [(0, 0, 3), (5, 3, 6), (6, 6, 9)]
    assert ranges(cut(stages, {1}, workers[1:])) == [(0, 0, 3), (7, 3, 9)]


@given(st.data())
def test_whatever_is_lost_layers_are_covered_by_who_holds_them(data: st.DataObject) -> None:
    inner = data.draw(st.lists(st.integers(1, 11), unique=True, max_size=4).map(sorted))
    stages = stages_of(0, *inner, 12)
    lost = data.draw(st.sets(st.sampled_from(range(len(stages))), min_size=1))
    pairs = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda pair: pair[0] < pair[1])
    workers = [ready(8 + number, held) for number, held in enumerate(data.draw(st.lists(pairs, max_size=6)))]
    found = cut(stages, lost, workers)
    if found is None:  # as many workers with all layers would do
        assert sum(worker.held == (0, 12) for worker in workers) < len(lost)
        return
    assert not holes(12, [(stage.start, stage.end) for stage in found])
    assert sum(stage.end - stage.start for stage in found) == 12
    assert len({stage.peer_id for stage in found}) == len(found)
    held = {worker.peer_id: worker.held for worker in workers}
    for stage in found:
        own = held.get(stage.peer_id)
        assert stage in stages or (own and own[0] <= stage.start and stage.end <= own[1])
    assert [stage for index, stage in enumerate(stages) if index not in lost] == [s for s in found if s in stages]
