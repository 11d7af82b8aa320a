"""Which of the waiting steps are computed together next. Pure: no torch, no trio.

Each job has at most one step waiting: a token to decode, or a chunk of its prompt. A pass takes the tokens that wait,
up to a bound, and with them as many chunks as fit a budget of rows; beside chunks it takes every token. So no chunk
holds tokens up for longer than one pass, and tokens never hold up chunks. Both kinds go in the order in which they
came, so that jobs take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from azu.models.memory import MAX_CHUNK_ROWS, MAX_JOBS

__all__ = ["StepQueue"]

W = TypeVar("W")


class StepQueue(Generic[W]):
    """Steps that wait, the oldest first.

    Args:
        is_wanted: asked when its turn comes; what nobody waits for any more is dropped.
        max_tokens: steps of one row in a pass.
        max_chunk_rows: rows of chunks in a pass, more only if a single chunk has more.
    """

    def __init__(
        self, is_wanted: Callable[[W], bool], *, max_tokens: int = MAX_JOBS, max_chunk_rows: int = MAX_CHUNK_ROWS
    ) -> None:
        self._is_wanted = is_wanted
        self._max_tokens = max_tokens
        self._max_chunk_rows = max_chunk_rows
        self._waiting: deque[tuple[W, int]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest(self) -> W:
        """The step that has waited for longest; there must be one."""
        return self._waiting[0][0]

    @property
    def has_chunks(self) -> bool:
        """Whether a step of several rows waits."""
        return any(rows > 1 for _, rows in self._waiting)

    def add(self, step: W, rows: int) -> None:
        """Let a step of so many rows wait."""
        self._waiting.append((step, rows))

    def next_alone(self) -> list[W]:
        """The oldest step, for a model whose jobs cannot share a pass; none if nobody waits."""
        while self._waiting:
            step, _ = self._waiting.popleft()
            if self._is_wanted(step):
                return [step]
        return []

    def next_pass(self, tokens_alone: int | None = None) -> list[W]:
        """The steps of the next pass; none if nobody waits.

        Args:
            tokens_alone: the most tokens of a pass without chunks.
        """
        chosen: list[W] = []
        left: deque[tuple[W, int]] = deque()
        tokens = chunk_rows = 0
        most = self._max_tokens
        if tokens_alone is not None and not self.has_chunks:
            most = min(most, tokens_alone)
        has_room = True
        for step, rows in self._waiting:
            if not self._is_wanted(step):
                continue
            if rows == 1 and tokens < most:
                tokens += 1
            elif rows > 1 and has_room and (not chunk_rows or chunk_rows + rows <= self._max_chunk_rows):
                chunk_rows += rows
            else:
                has_room = has_room and rows == 1  # no chunk overtakes another
                left.append((step, rows))
                continue
            chosen.append(step)
        self._waiting = left
        return chosen
