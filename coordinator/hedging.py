"""When a running job leaves a worker that has become slow, or whose line has. Pure: what was seen goes in, about once a
second.

What a step costs at a stage comes in parts, each of which has a usual time of its own: the pass of its worker and the
lines to its neighbours, by the worker's own word, and how soon it answers the coordinator, by the coordinator's clock.
A stage is slow where one of them takes `_SLOW` times its median, at `_LOOKS` looks in a row. A worker's word can cost
nobody but itself the job: a line that it says is slow may make the job leave it, never its neighbour. And the tokens
have to come late by the coordinator's clock, by half of what those parts take longer, at least.

What is usual with a pass and an answer is known from before the job (`coordinator/usual.py`): one that began a moment
ago has seen too little of its workers. With a line it is what the job has seen.

A move costs a pause, in which another worker computes all positions of the stage anew. It is worth that where what it
saves clearly exceeds it. Nobody knows how long an answer will be: as much again as there is already, and no more than
its ticket allows, is a guess that is never far off for long.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Hedging", "Offer", "Part", "Reading", "Slow", "is_worth_it"]

Kind = Literal["pass", "line", "answer"]

_SLOW = 3.0
# What takes longer by less is not slow, however short it is usually. Short lines and answers are several times as long
# on machines that have much to do, wherever a job goes.
_LEAST_S: Mapping[Kind, float] = {"pass": 0.005, "line": 0.02, "answer": 0.02}
_LOOKS = 3  # so often in a row, and so many are needed to know what is usual
_KEPT = 64  # looks of which the median is what is usual
_LATE = 0.5  # of what a stage takes longer, the tokens have to come later
_MOST_MOVES = 2  # of a job
# What a move costs besides computing again: another worker is dialled, and all stages pause.
_PAUSE_S = 2.0
_CLEARLY = 3.0


class Part(NamedTuple):
    """A stage's worker, and what takes time there: its line to a `neighbour`, its pass, or its answer."""

    peer_id: str
    kind: Kind
    neighbour: str = ""


class Reading(NamedTuple):
    """Seconds that a part adds to a step now, and usually, where that is known; else 0."""

    now_s: float
    usual_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Slow:
    """A stage that has become slow. Seconds of a step there with all its parts, now and usually, and by which each
    token comes late. kind: of the part that takes longer by most.
    """

    peer_id: str
    step_s: float
    usual_s: float
    late_s: float
    kind: Kind = "pass"


@dataclass(frozen=True, slots=True)
class Offer:
    """What another worker promises: seconds of a step with the same parts, and until it has computed all positions so
    far.
    """

    step_s: float
    replay_s: float


class Hedging:
    """One job's stages, as they go. left: peers that were slow and whose stage another one took over."""

    def __init__(self) -> None:
        self.left: set[str] = set()
        self._usual: dict[Part, deque[float]] = {}
        self._slow: Counter[Part] = Counter()  # looks in a row
        self._trips: deque[float] = deque(maxlen=_KEPT)
        self._last: tuple[int, float] | None = None
        self._moves = 0

    def moved(self, peer_id: str) -> None:
        """The job has left this peer."""
        self.left.add(peer_id)
        self._moves += 1

    def pause(self) -> None:
        """The job was paused: the time until the next token tells nothing."""
        self._last = None
        self._slow.clear()

    def look(self, tokens: int, told_at: float, parts: Mapping[Part, Reading]) -> list[Slow]:
        """The stages that are slow, the slowest first, if the job may still leave one.

        Args:
            tokens: that have come, the last one at `told_at`, in seconds of a steady clock.
            parts: of all stages, as far as they are known.
        """
        before, self._last = self._last, (tokens, told_at)
        if before is None or tokens <= before[0]:
            self._last = before or self._last
            return []
        trip_s = (told_at - before[1]) / (tokens - before[0])
        usual = {part: self._usual_s(part, reading) for part, reading in parts.items()}
        usual_trip_s = self._usual_trip_s(usual)
        slow = [part for part, reading in parts.items() if self._is_slow(part, reading, usual[part])]
        if not slow:
            self._trips.append(trip_s)
        if self._moves >= _MOST_MOVES or usual_trip_s is None:
            return []
        found: list[Slow] = []
        for peer_id in {part.peer_id for part in slow if self._slow[part] >= _LOOKS}:
            its = [part for part in parts if part.peer_id == peer_id]
            excess = {part: parts[part].now_s - usual[part] if usual[part] else 0.0 for part in its}
            step_s, kind = sum(parts[part].now_s for part in its), max(its, key=excess.__getitem__).kind
            found.append(Slow(peer_id, step_s, step_s - sum(excess.values()), trip_s - usual_trip_s, kind))
        late = (each for each in found if each.late_s >= _LATE * (each.step_s - each.usual_s))
        return sorted(late, key=lambda each: each.usual_s - each.step_s)

    def _usual_s(self, part: Part, reading: Reading) -> float:
        """0 where nobody knows."""
        seen = self._usual.get(part, ())
        return reading.usual_s or (statistics.median(seen) if len(seen) >= _LOOKS else 0.0)

    def _usual_trip_s(self, usual: Mapping[Part, float]) -> float | None:
        """As the job has seen it; in one that has not seen enough yet, what its stages' passes usually take."""
        if len(self._trips) >= _LOOKS:
            return statistics.median(self._trips)
        passes = [seconds for part, seconds in usual.items() if part.kind == "pass"]
        return sum(passes) if passes and all(passes) else None

    def _is_slow(self, part: Part, reading: Reading, usual_s: float) -> bool:
        """Whether a part takes too long now; what does not is what is usual."""
        if usual_s and reading.now_s >= max(_SLOW * usual_s, usual_s + _LEAST_S[part.kind]):
            self._slow[part] += 1
            return True
        self._usual.setdefault(part, deque(maxlen=_KEPT)).append(reading.now_s)
        self._slow[part] = 0
        return False


def is_worth_it(slow: Slow, offer: Offer, *, done: int, left: int) -> bool:
    """Whether a job is to go on with the other worker.

    Args:
        done: tokens that have come. left: those that may still come.
    """
    saved_s = min(slow.step_s - offer.step_s, slow.late_s) * min(done, left)
    return saved_s > _CLEARLY * (_PAUSE_S + offer.replay_s)
