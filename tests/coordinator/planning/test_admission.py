"""The fair queue: whose turn it is, who is overtaken, who makes room, and when to try again."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.admission import MAX_OVERTAKEN, FairQueue, Waiting

Name = str


def fill(queue: FairQueue[Name], *jobs: tuple[Name, str, int], kind: str = "m", now: float = 0.0) -> None:
    for name, account, cost in jobs:
        assert queue.submit(name, account, kind, cost, now)[0] is not None


def take_all(queue: FairQueue[Name], now: float = 1.0) -> list[Name]:
    found = []
    while (taken := queue.take(lambda name: name, now)) is not None:
        found.append(taken[1])
    return found


def test_one_account_is_served_in_order() -> None:
    queue = FairQueue[Name](8)
    fill(queue, ("1", "a", 5), ("2", "a", 1), ("3", "a", 9))
    assert take_all(queue) == ["1", "2", "3"]
    assert len(queue) == 0


def test_a_newcomer_does_not_wait_for_all_that_another_sent_before() -> None:
    queue = FairQueue[Name](8)
    fill(queue, ("a1", "a", 10), ("a2", "a", 10), ("a3", "a", 10), ("b1", "b", 10), ("b2", "b", 10))
    assert take_all(queue) == ["a1", "b1", "a2", "b2", "a3"]


def test_small_jobs_get_as_many_positions_as_large_ones() -> None:
    queue = FairQueue[Name](64)
    fill(queue, *[(f"a{index}", "a", 100) for index in range(3)], *[(f"b{index}", "b", 25) for index in range(12)])
    order = take_all(queue)
    assert [name[0] for name in order[:10]] == list("abbbbabbbb")


def test_who_was_away_has_saved_nothing_up() -> None:
    queue = FairQueue[Name](64)
    fill(queue, *[(f"a{index}", "a", 10) for index in range(20)])
    for _ in range(10):
        assert queue.take(lambda name: name, 1.0) is not None
    fill(queue, *[(f"b{index}", "b", 10) for index in range(10)])
    assert [name[0] for name in take_all(queue)[:6]] == list("bababa")


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60),
    st.integers(1, 60),
)
def test_accounts_that_always_wait_are_given_alike(jobs: list[tuple[str, int]], count: int) -> None:
    """Never further apart than one job of each, for as long as both have jobs waiting."""
    queue = FairQueue[tuple[str, int]](100)
    waiting: dict[str, deque[int]] = {account: deque() for account in "abc"}
    for account, cost in jobs:
        assert queue.submit((account, cost), account, "m", cost, 0.0)[0] is not None
        waiting[account].append(cost)
    given_out: Counter[str] = Counter()
    busy = [account for account in "abc" if waiting[account]]
    largest = max(cost for _, cost in jobs)
    for _ in range(min(count, len(jobs))):
        taken = queue.take(lambda job: job, 1.0)
        assert taken is not None
        account, cost = taken[1]
        assert waiting[account].popleft() == cost, "not in order"
        given_out[account] += cost
        busy = [each for each in busy if waiting[each]]
        assert all(abs(given_out[one] - given_out[other]) <= 2 * largest for one in busy for other in busy)


def test_a_job_that_does_not_fit_lets_others_pass_and_gets_its_turn() -> None:
    queue = FairQueue[Name](100)
    fill(queue, ("large", "a", 1))
    passed = 0
    while True:
        fill(queue, (f"small{passed}", "a", 1))
        taken = queue.take(lambda name: name if name != "large" else None, float(passed))
        if taken is None:
            break
        passed += 1
    assert passed == MAX_OVERTAKEN
    fill(queue, ("of another model", "b", 1), kind="other")
    assert queue.take(lambda name: name if name != "large" else None, 1.0) is not None, "another model's job is held up"
    taken = queue.take(lambda name: name, 1.0)
    assert taken is not None
    assert taken[1] == "large"


def test_a_full_queue_belongs_to_all_accounts() -> None:
    queue = FairQueue[Name](4)
    fill(queue, ("a1", "a", 1), ("a2", "a", 1), ("a3", "a", 1), ("a4", "a", 1))
    assert queue.submit("a5", "a", "m", 1, 0.0) == (None, None)
    place, dropped = queue.submit("b1", "b", "m", 1, 0.0)
    assert place is not None
    assert dropped is not None
    assert dropped.item == "a4"
    place, dropped = queue.submit("b2", "b", "m", 1, 0.0)
    assert dropped is not None
    assert dropped.item == "a3"
    assert queue.submit("b3", "b", "m", 1, 0.0) == (None, None), "they have as many each"
    assert len(queue) == 4
    assert take_all(queue) == ["a1", "b1", "a2", "b2"]


@given(
    st.lists(st.tuples(st.sampled_from(["submit", "take", "cancel", "nothing fits"]), st.integers(0, 9)), max_size=80)
)
def test_nothing_is_lost_or_given_twice(actions: list[tuple[str, int]]) -> None:
    queue = FairQueue[int](8)
    inside: dict[int, Waiting[int]] = {}
    for number, (action, which) in enumerate(actions):
        if action == "submit":
            place, dropped = queue.submit(number, str(which % 4), str(which % 2), 1 + which, float(number))
            if dropped is not None:
                del inside[dropped.item]
            if place is not None:
                inside[number] = place
        elif action == "take" and (taken := queue.take(lambda item: item + 1, float(number))) is not None:
            assert inside.pop(taken[0].item) is taken[0]
            assert taken[1] == taken[0].item + 1
        elif action == "cancel" and inside:
            place = inside.pop(sorted(inside)[which % len(inside)])
            queue.cancel(place)
            queue.cancel(place)
        elif action == "nothing fits":
            assert queue.take(lambda item: None, float(number)) is None
        assert len(queue) == len(inside) <= 8
    while (taken := queue.take(lambda item: item + 1, 99.0)) is not None:
        del inside[taken[0].item]
    assert not inside


def test_how_long_to_wait_follows_from_how_long_others_waited() -> None:
    queue = FairQueue[Name](100)
    fill(queue, *[(f"a{index}", "a", 10) for index in range(8)])
    assert queue.retry_after_s("a") is None
    for second in (3.0, 6.0, 9.0, 12.0):
        assert queue.take(lambda name: name, second) is not None
    assert queue.retry_after_s("a") == pytest.approx(5 * 3.0), "four others of its own come first"
    assert queue.retry_after_s("new") == pytest.approx(3.0), "none of them"
    for _ in range(20):
        assert queue.submit("x", "a", "m", 10, 12.0)[0] is not None
    assert queue.take(lambda name: name, 12_000.0) is not None
    assert queue.retry_after_s("a") == 600.0


def test_who_is_let_in_at_once_says_nothing_of_how_long_it_takes() -> None:
    queue = FairQueue[Name](4)
    for second in range(5):
        fill(queue, ("x", "a", 1), now=float(second))
        assert queue.take(lambda name: name, float(second)) is not None
    assert queue.retry_after_s("a") is None


def test_accounts_that_nobody_waits_for_are_forgotten() -> None:
    queue = FairQueue[Name](4)
    fill(queue, ("waits", "z", 1), kind="other")
    for number in range(1_000):
        fill(queue, ("x", f"account{number}", 1))
        assert queue.take(lambda name: None if name == "waits" else name, 0.0) is not None
    assert len(queue._accounts) <= 16 * 4 + 1
    assert take_all(queue)
    assert not queue._accounts
