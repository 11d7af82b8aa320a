"""The queue of steps: who goes together, in which order, and that nobody waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.engine.scheduler import StepQueue

Step = tuple[int, int]  # number, rows


ONLY = "the only group"


def queue_of(*rows: int, gone: frozenset[int] = frozenset(), **bounds: int) -> StepQueue[str, Step]:
    queue: StepQueue[str, Step] = StepQueue(lambda step: step[0] not in gone, **bounds)
    for number, count in enumerate(rows):
        queue.add(ONLY, (number, count), count)
    return queue


def numbers(steps: list[Step]) -> list[int]:
    return [number for number, _ in steps]


def test_tokens_go_together_and_with_as_many_chunks_as_fit() -> None:
    queue = queue_of(1, 100, 1, 150, 10, 5, 1, max_chunk_rows=256)
    assert numbers(queue.next_pass(ONLY)) == [0, 1, 2, 3, 6]
    assert numbers(queue.next_pass(ONLY)) == [4, 5]
    assert queue.next_pass(ONLY) == []


def test_fewer_tokens_go_alone_than_with_a_chunk() -> None:
    queue = queue_of(1, 1, 1, 1, 1)
    assert numbers(queue.next_pass(ONLY, 2)) == [0, 1]
    queue.add(ONLY, (5, 9), 9)
    assert queue.has_chunks(ONLY)
    assert numbers(queue.next_pass(ONLY, 2)) == [2, 3, 4, 5]
    assert not queue.has_chunks(ONLY)


def test_a_chunk_beyond_the_budget_goes_by_itself() -> None:
    queue = queue_of(300, 300, 1, max_chunk_rows=256)
    assert numbers(queue.next_pass(ONLY)) == [0, 2]
    assert numbers(queue.next_pass(ONLY)) == [1]


def test_what_nobody_waits_for_is_dropped() -> None:
    queue = queue_of(1, 5, 1, gone=frozenset({0, 1}))
    assert numbers(queue.next_pass(ONLY)) == [2]
    assert len(queue) == 0
    assert queue_of(1, 5, 1, gone=frozenset({0})).next_alone(ONLY) == [(1, 5)]
    assert queue_of(1, gone=frozenset({0})).next_alone(ONLY) == []


@given(
    st.lists(st.one_of(st.just(1), st.integers(2, 400)), max_size=80),
    st.sets(st.integers(0, 79)),
    st.integers(1, 8),
    st.integers(1, 300),
)
def test_every_step_has_its_turn_once_and_in_order(
    rows: list[int], gone: set[int], max_tokens: int, max_chunk_rows: int
) -> None:
    queue = queue_of(*rows, gone=frozenset(gone), max_tokens=max_tokens, max_chunk_rows=max_chunk_rows)
    passes: list[list[Step]] = []
    while step := queue.next_pass(ONLY):
        passes.append(step)
    served = [each for steps in passes for each in steps]
    assert sorted(numbers(served)) == [number for number in range(len(rows)) if number not in gone]
    for is_token in (True, False):  # each kind in the order in which it came
        kind = [number for number, count in served if (count == 1) == is_token]
        assert kind == sorted(kind)
    for steps in passes:
        chunks = [count for _, count in steps if count > 1]
        assert sum(count == 1 for _, count in steps) <= max_tokens
        assert len(chunks) <= 1 or sum(chunks) <= max_chunk_rows
    tokens = sum(count == 1 for number, count in enumerate(rows) if number not in gone)
    turns = [index for index, steps in enumerate(passes) for _, count in steps if count == 1]
    assert max(turns, default=-1) + 1 == -(-tokens // max_tokens), "a token waited for chunks"


@given(st.lists(st.integers(1, 300), max_size=40), st.data())
def test_jobs_take_turns(rows: list[int], data: st.DataObject) -> None:
    """A job that comes back at once does not overtake one that waits."""
    queue = queue_of(*rows, max_tokens=3)
    served: list[int] = []
    for _ in range(200):
        steps = queue.next_pass(ONLY)
        served += numbers(steps)
        for step in steps:
            queue.add(ONLY, step, step[1])
    counts = [served.count(number) for number, count in enumerate(rows) if count == 1]
    assert max(counts, default=0) - min(counts, default=0) <= 1


def test_groups_take_turns() -> None:
    queue: StepQueue[str, Step] = StepQueue(lambda _: True, max_chunk_rows=100)
    for group, number, rows in (("a", 0, 100), ("b", 1, 1), ("a", 2, 100), ("a", 3, 1), ("b", 4, 1)):
        queue.add(group, (number, rows), rows)
    assert len(queue) == 5
    assert list(queue.groups) == ["a", "b"]
    assert queue.oldest("b") == (1, 1)
    assert not queue.has_chunks("b")
    assert numbers(queue.next_pass("a")) == [0, 3]
    assert list(queue.groups) == ["b", "a"]  # though what waits of a came before
    assert numbers(queue.next_pass("b")) == [1, 4]
    assert numbers(queue.next_pass("a")) == [2]
    assert list(queue.groups) == []
    assert queue.next_pass("a") == queue.next_alone("b") == []


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 1, 90, 256])), max_size=40))
def test_a_token_waits_for_one_pass_of_each_other_group(steps: list[tuple[int, int]]) -> None:
    """Jobs come back as soon as they are served, and the group whose turn it is goes."""
    queue: StepQueue[int, tuple[int, int]] = StepQueue(lambda _: True)
    for number, (group, rows) in enumerate(steps):
        queue.add(group, (number, rows), rows)
    waits = [0] * len(steps)
    for _ in range(40):
        group = next(queue.groups, None)
        if group is None:
            break
        served = queue.next_pass(group)
        assert {steps[number][0] for number, _ in served} == {group}
        waits = [0 if number in dict(served) else wait + 1 for number, wait in enumerate(waits)]
        assert all(wait < 4 for (_, rows), wait in zip(steps, waits, strict=True) if rows == 1)
        for number, rows in served:
            queue.add(group, (number, rows), rows)
