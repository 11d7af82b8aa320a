"""What is kept of what was sent: any part of it comes back as it was, and the budget holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.history import History, HistoryBudget

ROW = 3


def rows(start: int, end: int) -> bytes:
    return b"".join(bytes([position % 256]) * ROW for position in range(start, end))


@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    begin=st.integers(0, 9),
    skipped=st.integers(0, 120),
    most=st.integers(1, 20),
)
def test_any_part_comes_back(sizes: list[int], begin: int, skipped: int, most: int) -> None:
    budget = HistoryBudget(10_000)
    history = History(budget, ROW)
    history.begin(begin)
    end, start = begin, begin + skipped
    for size in sizes:
        history.add(rows(end, end + size))
        end += size
    parts = list(history.replay(start, most))
    assert b"".join(body for _, body in parts) == rows(start, end)
    assert [position for position, _ in parts] == list(range(start, end, most))
    assert all(len(body) <= most * ROW for _, body in parts)
    assert budget.held == (end - begin) * ROW
    assert history.has(start, end)
    assert history.has(begin - 1, end) == (end < begin)
    history.clear()
    assert budget.held == 0


def test_who_exceeds_the_budget_loses_all_and_may_begin_again() -> None:
    budget = HistoryBudget(10 * ROW)
    one, other = History(budget, ROW), History(budget, ROW)
    one.add(rows(0, 6))
    other.add(rows(0, 4))
    other.add(rows(4, 5))
    assert (one.is_whole, other.is_whole) == (True, False)
    assert (budget.held, budget.dropped) == (6 * ROW, 1)
    other.add(rows(5, 6))
    assert (list(other.replay(0, 9)), budget.held, budget.dropped) == ([], 6 * ROW, 1)
    other.clear()
    other.add(rows(0, 4))
    assert other.is_whole
    assert list(other.replay(1, 9)) == [(1, rows(1, 4))]
    assert list(one.replay(0, 9)) == [(0, rows(0, 6))]
