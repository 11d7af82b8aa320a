"""Which of the waiting steps are computed together next. Pure: no torch, no trio.

Each job has at most one step waiting: a token to decode, or a chunk of its prompt. A pass takes the tokens that wait,
up to a bound, and with them as many chunks as fit a budget of rows; beside chunks it takes every token. So no chunk
holds tokens up for longer than one pass, and tokens never hold up chunks. Both kinds go in the order in which they
came, so that jobs take turns.

Steps of different groups cannot share a pass: a group is a part of the loaded layers (or all of them), as a job's
ticket names it. Groups take turns, a pass each, so that a token waits for one pass of each other group at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from azu.models.memory import MAX_CHUNK_ROWS, MAX_JOBS

__all__ = ["StepQueue"]

W = TypeVar("W")
G = TypeVar("G", bound=Hashable)


class StepQueue(Generic[G, W]):
    """Steps that wait, each group's oldest first.

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
        self._waiting: dict[G, deque[tuple[W, int]]] = {}  # the group whose turn it is comes first

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))  # a copy: other threads may ask

    @property
    def groups(self) -> Iterator[G]:
        """Those that have steps, in the order of their turns."""
        return iter(self._waiting)

    def oldest(self, group: G) -> W:
        """The group's step that has waited for longest; there must be one."""
        return self._waiting[group][0][0]

    def has_chunks(self, group: G) -> bool:
        """Whether a step of several rows waits."""
        return any(rows > 1 for _, rows in self._waiting.get(group, ()))

    def add(self, group: G, step: W, rows: int) -> None:
        """Let a step of so many rows wait."""
        self._waiting.setdefault(group, deque()).append((step, rows))

    def next_alone(self, group: G) -> list[W]:
        """The group's oldest step, for jobs that cannot share a pass; none if nobody waits."""
        waiting = self._waiting.pop(group, deque())
        while waiting:
            step, _ = waiting.popleft()
            if self._is_wanted(step):
                self._keep(group, waiting)
                return [step]
        return []

    def next_pass(self, group: G, tokens_alone: int | None = None) -> list[W]:
        """The steps of the group's next pass; none if nobody waits. It is the other groups' turn then.

        Args:
            tokens_alone: the most tokens of a pass without chunks.
        """
        chosen: list[W] = []
        left: deque[tuple[W, int]] = deque()
        tokens = chunk_rows = 0
        most = self._max_tokens
        if tokens_alone is not None and not self.has_chunks(group):
            most = min(most, tokens_alone)
        has_room = True
        for step, rows in self._waiting.pop(group, ()):
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
        self._keep(group, left)
        return chosen

    def _keep(self, group: G, left: deque[tuple[W, int]]) -> None:
        if left:
            self._waiting[group] = left  # behind the others
