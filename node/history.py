"""What a stage has sent on for its jobs, kept so that a worker that takes the next stage over can be sent it again.

Rows lie in main memory in the dtype that they travel in. All jobs of a worker share one budget: the job that would
exceed it loses its whole history, since a part is of no use, and where it is needed then the stage computes anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from azu.wire.frames import Buffer

__all__ = ["History", "HistoryBudget"]


class HistoryBudget:
    """Bytes that all jobs' histories may take together. dropped: histories that were given up, since the start."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.dropped = 0


class History:
    """The rows that one job's stage gave, from position `start` on.

    Args:
        row_bytes: size of one position's hidden states.
    """

    def __init__(self, budget: HistoryBudget, row_bytes: int) -> None:
        self._budget = budget
        self._row = row_bytes
        self._starts: list[int] = []  # positions at which the parts begin
        self._parts: list[bytes] = []
        self.start = self._end = 0
        self.is_whole = True  # from there on, until it was dropped

    def add(self, rows: Buffer) -> None:
        """Keep the rows that follow those that were added before."""
        if not self.is_whole:
            return
        if self._budget.held + len(rows) > self._budget.limit:
            self.clear()
            self.is_whole = False
            self._budget.dropped += 1
            return
        self._starts.append(self._end)
        self._parts.append(bytes(rows))
        self._end += len(rows) // self._row
        self._budget.held += len(rows)

    def has(self, start: int, end: int) -> bool:
        """Whether it can give the rows of positions `start` .. `end - 1`, if there are any."""
        return start >= end or (self.is_whole and self.start <= start)

    def replay(self, start: int, most: int) -> Iterator[tuple[int, bytes]]:
        """The rows of positions `start` and later, at most so many at a time, with the first one's position each."""
        while start < self._end:
            end = min(start + most, self._end)
            yield start, self._rows(start, end)
            start = end

    def _rows(self, start: int, end: int) -> bytes:
        first = bisect_right(self._starts, start) - 1
        last = bisect_right(self._starts, end - 1)
        skipped = (start - self._starts[first]) * self._row
        return b"".join(self._parts[first:last])[skipped : skipped + (end - start) * self._row]

    def clear(self) -> None:
        """Forget everything, to begin at position 0 again."""
        self.begin(0)

    def begin(self, position: int) -> None:
        """Forget everything, to begin at this position."""
        self._budget.held -= (self._end - self.start) * self._row
        self._starts, self._parts, self.is_whole = [], [], True
        self.start = self._end = position
