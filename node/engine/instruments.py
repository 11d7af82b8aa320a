"""What the passes of the device thread cost, cheaply enough to count always."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PassStatistics", "Passes"]


@dataclass(frozen=True, slots=True)
class PassStatistics:
    """Sums since the start. passes: forward passes; steps: jobs' steps in them, of which `tokens` had one row; rows: of
    all steps; token_layers: these times the layers that they went through. compute_s: seconds in passes; waited_s:
    seconds that steps waited for theirs, summed; longest_s: the longest pass; largest: steps in the fullest one.
    """

    passes: int = 0
    steps: int = 0
    tokens: int = 0
    rows: int = 0
    token_layers: int = 0
    compute_s: float = 0.0
    waited_s: float = 0.0
    longest_s: float = 0.0
    largest: int = 0

    @property
    def mean_batch(self) -> float:
        """Steps in a pass."""
        return self.steps / self.passes if self.passes else 0.0


class Passes:
    """Written by the device thread, read by anybody."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = PassStatistics()
        self.recent_s = 0.0  # the longest since `take_longest`

    def note(self, started: float, ended: float, layers: int, rows: Sequence[int], since: Sequence[float]) -> None:
        """Count a pass through so many layers. Times by one clock, in seconds; `since`: when each of its steps began to
        wait.
        """
        with self._lock:
            now, seconds = self._now, ended - started
            self._now = PassStatistics(
                passes=now.passes + 1,
                steps=now.steps + len(rows),
                tokens=now.tokens + sum(each == 1 for each in rows),
                rows=now.rows + sum(rows),
                token_layers=now.token_layers + layers * sum(rows),
                compute_s=now.compute_s + seconds,
                waited_s=now.waited_s + sum(started - each for each in since),
                longest_s=max(now.longest_s, seconds),
                largest=max(now.largest, len(rows)),
            )
            self.recent_s = max(self.recent_s, seconds)

    def statistics(self) -> PassStatistics:
        """A snapshot."""
        with self._lock:
            return self._now

    def take_longest(self) -> float:
        """The longest pass since this was last called, in seconds."""
        with self._lock:
            longest, self.recent_s = self.recent_s, 0.0
            return longest
