"""What is usual with a worker: how long its passes take by its own records, and how soon it answers. Pure.

One sample in every `_EVERY_S` is kept, of the last minutes: a worker that is slow for longer than half of that is as it
usually is.
"""

from __future__ import annotations

import statistics
from collections import deque

from azu.records import Speed, WorkerRecord

__all__ = ["Usual"]

_EVERY_S, _KEPT = 20.0, 24
_FEWEST = 3  # samples, which are taken at once, before anything is said
_ANSWERS = 3  # of which the median is how soon it answers now


class Usual:
    """Of one worker, from record to record.

    Attributes:
        answer_s: seconds in which it answers now; 0 before it has.
    """

    def __init__(self) -> None:
        self.answer_s = 0.0
        self._stage: object = None
        self._latest: deque[float] = deque(maxlen=_ANSWERS)
        self._answers: deque[float] = deque(maxlen=_KEPT)
        self._paces: deque[tuple[int, int]] = deque(maxlen=_KEPT)
        self._answers_due = self._paces_due = float("-inf")

    def note(self, record: WorkerRecord, answer_s: float, now: float) -> None:
        """A record came within so many seconds."""
        self._latest.append(answer_s)
        self.answer_s = statistics.median(self._latest)
        if now >= self._answers_due:
            self._answers.append(self.answer_s)
            self._answers_due = now + _EVERY_S if len(self._answers) >= _FEWEST else now
        stage = [(held.manifest, held.start, held.end) for held in record.ranges if held.state == "loaded"]
        if stage != self._stage:  # other layers, another pace
            self._stage, self._paces_due = stage, now
            self._paces.clear()
        if now >= self._paces_due and _is_known(record.speed):
            self._paces.append((record.speed.decode_base_ns, record.speed.decode_token_ns))
            self._paces_due = now + _EVERY_S if len(self._paces) >= _FEWEST else now

    @property
    def usual_answer_s(self) -> float:
        """Seconds in which it usually answers; 0 where that is not known."""
        return statistics.median(self._answers) if len(self._answers) >= _FEWEST else 0.0

    def step_s(self, layers: int, jobs: int) -> float:
        """Seconds that a pass of so many jobs usually takes through so many layers; 0 where that is not known."""
        if len(self._paces) < _FEWEST:
            return 0.0
        return layers * statistics.median(base + jobs * token for base, token in self._paces) / 1e9


def _is_known(speed: Speed) -> bool:
    return bool(speed.decode_base_ns or speed.decode_token_ns)
