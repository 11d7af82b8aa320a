"""When a running job leaves a worker that has become slow. Pure: what was seen goes in, about once a second.

A stage is slow where a pass of its worker takes `_SLOW` times what it usually took while the job ran there. The worker
measures that and says so itself: its word can cost nobody but itself the job. The coordinator's own clock has to
agree, by which tokens come late; nobody's word about another counts. Time outside of a pass with tokens alone is no
sign: a prompt's chunks, the wait for KV cache or for a group of tokens, the lines, the rest of the ring.

A move costs a pause, in which another worker computes all positions of the stage anew. It is worth that where what it
saves clearly exceeds it. Nobody knows how long an answer will be: as much again as there is already, and no more than
its ticket allows, is a guess that is never far off for long.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Hedging", "Offer", "Slow", "is_worth_it"]

_SLOW = 3.0
_LOOKS = 3  # so often in a row, and so many are needed to know what is usual
_KEPT = 64  # looks of which the median is what is usual
_LATE = 0.5  # of what a stage takes longer, the tokens have to come later
_MOST_MOVES = 2  # of a job
# What a move costs besides computing again: another worker is dialled, and all stages pause.
_PAUSE_S = 2.0
_CLEARLY = 3.0


@dataclass(frozen=True, slots=True)
class Slow:
    """A stage that has become slow. Seconds of a step there, now and usually, and by which each token comes late."""

    peer_id: str
    step_s: float
    usual_s: float
    late_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """What another worker promises: seconds of a step, and until it has computed all positions so far."""

    step_s: float
    replay_s: float


class Hedging:
    """One job's stages, as they go. left: peers that were slow and whose stage another one took over."""

    def __init__(self) -> None:
        self.left: set[str] = set()
        self._usual: dict[str, deque[float]] = {}
        self._slow: Counter[str] = Counter()  # looks in a row
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

    def look(self, tokens: int, told_at: float, steps: Mapping[str, float]) -> Slow | None:
        """The slowest of the stages that are slow, if the job may still leave it.

        Args:
            tokens: that have come, the last one at `told_at`, in seconds of a steady clock.
            steps: seconds that a step takes now by each stage's own word, by peer id; without those who do not know.
        """
        before, self._last = self._last, (tokens, told_at)
        if before is None or tokens <= before[0]:
            self._last = before or self._last
            return None
        trip_s = (told_at - before[1]) / (tokens - before[0])
        slow = {peer_id: step_s for peer_id, step_s in steps.items() if self._is_slow(peer_id, step_s)}
        if not slow:
            self._trips.append(trip_s)
        if self._moves >= _MOST_MOVES or len(self._trips) < _LOOKS:
            return None
        late_s = trip_s - statistics.median(self._trips)
        found = [
            Slow(peer_id, step_s, self._usual_s(peer_id), late_s)
            for peer_id, step_s in slow.items()
            if self._slow[peer_id] >= _LOOKS and late_s >= _LATE * (step_s - self._usual_s(peer_id))
        ]
        return max(found, key=lambda each: each.step_s - each.usual_s, default=None)

    def _usual_s(self, peer_id: str) -> float:
        return statistics.median(self._usual[peer_id])

    def _is_slow(self, peer_id: str, step_s: float) -> bool:
        """Whether a step takes too long now; what does not is what is usual."""
        usual = self._usual.setdefault(peer_id, deque(maxlen=_KEPT))
        if len(usual) >= _LOOKS and step_s >= _SLOW * statistics.median(usual):
            self._slow[peer_id] += 1
            return True
        usual.append(step_s)
        self._slow[peer_id] = 0
        return False


def is_worth_it(slow: Slow, offer: Offer, *, done: int, left: int) -> bool:
    """Whether a job is to go on with the other worker.

    Args:
        done: tokens that have come. left: those that may still come.
    """
    saved_s = min(slow.step_s - offer.step_s, slow.late_s) * min(done, left)
    return saved_s > _CLEARLY * (_PAUSE_S + offer.replay_s)
