"""In how many groups the tokens of a ring's jobs go round. Pure: no torch, no trio, no clock.

The first stage decides it: a pass waits for its share of the tokens that are away, and takes no more than that. Few
large groups save work, since a pass over 16 tokens takes far less than 16 passes; more groups keep all stages busy.
What is best depends on what nobody here knows: whether stages share a machine, how long a trip takes, how a pass grows
with its tokens. So it is tried: the number of groups is kept that gave the most tokens per second, and the next smaller
and the next larger one are tried now and then. (vLLM and others set as many as the pipeline has stages.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Gathering"]

_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)  # that are tried
_FIRST = 2
_ROUNDS = 8  # tokens of each job in one trial
_SETTLE = 2  # rounds after a change that do not count
_GLANCE, _POOR = 3, 0.9  # rounds after which a trial ends that gave less than this share of what the best one does
_GAIN, _SURE = 1.02, 1.1  # how much better another number has to be, and in a single trial
_PAUSE, _LONGEST_PAUSE = 2, 64  # trials between two with another number, at first and in the end, ...
_GROWS, _GROWS_FAST = 2, 8  # and how it grows from one to the next, where the other number was not good, or poor
_SMOOTH = 0.3  # weight of a new measurement
_LOST = 4.0  # trips after which a token does not count as away any more


@dataclass(slots=True)
class _Record:
    """What was found out with about so many jobs."""

    best: int = _FIRST
    rate: float = 0.0  # tokens per second when the best one was tried last
    # Others -> their rate, as a share of the best one's just before: a machine's speed changes more from minute to
    # minute than from one number to the next.
    shares: dict[int, float] = field(default_factory=dict)
    pause: int = _PAUSE
    trials: int = 0  # with the best one since another was tried
    detours: int = 0


class Gathering:
    """Decides for one stage. All times are seconds of one clock that the caller reads."""

    def __init__(self) -> None:
        self.groups = 1  # in force now
        self._here: set[int] = set()  # jobs whose token waits
        self._away: dict[int, float] = {}  # job -> when its token left
        self._trip = 0.0  # how long a token is away, smoothed
        self._passes = 0
        self._records: dict[int, _Record] = {}
        self._jobs = 0  # in the trial that runs
        self._began: float | None = None  # when it did, once it has settled
        self._tokens = 0  # since then; negative before
        self._disturbed = 0  # rows of prompts since then

    def came(self, job: int, now: float) -> None:
        """A job's token is here."""
        since = self._away.pop(job, None)
        if since is not None:
            self._trip += (now - since - self._trip) * (_SMOOTH if self._trip else 1.0)
        self._here.add(job)

    def left(self, jobs: Sequence[int], chunk_rows: int, now: float) -> None:
        """A pass is over: these jobs' next tokens are on their way. It also held so many rows of prompts."""
        for job in jobs:
            self._here.discard(job)
            self._away[job] = now
        self._passes += 1
        self._tokens += len(jobs)
        self._disturbed += chunk_rows
        self._measure(now)

    def forget(self, job: int) -> None:
        """A job has ended."""
        self._away.pop(job, None)
        self._here.discard(job)

    @property
    def size(self) -> int:
        """The tokens of the next group, as even as can be: a pass waits for so many, and takes no more."""
        return max(1, (self._count + self._passes % self.groups) // self.groups)

    @property
    def _count(self) -> int:
        return len(self._here) + len(self._away)

    def patience(self, since: float, now: float) -> float:
        """How long to wait for another token, in seconds, where the oldest that waits came at `since`."""
        for job, when in list(self._away.items()):
            if now - when > _LOST * self._trip > 0:
                del self._away[job]
        if len(self._here) >= self.size:
            return 0.0
        return max(0.0, since + self._trip - now)

    # --- trials

    def _measure(self, now: float) -> None:
        jobs = self._count
        if jobs < 2 or abs(jobs - self._jobs) * 4 > self._jobs:
            self._begin(jobs)
        elif self._began is None:
            if self._tokens >= 0:
                self._began, self._tokens, self._disturbed = now, 0, 0
        elif self._tokens >= _GLANCE * jobs:
            rate = self._tokens / (now - self._began)
            if self._tokens >= _ROUNDS * jobs or self._is_poor(rate):
                if self._disturbed <= self._tokens:
                    self._conclude(rate)
                self._begin(jobs)

    def _begin(self, jobs: int) -> None:
        """Choose the number of groups of the next trial."""
        self._jobs, self._began = jobs, None
        self._tokens, self._disturbed = -_SETTLE * jobs, 0
        record = self._record(jobs)
        at = _GROUPS.index(record.best)
        beside = [groups for groups in _GROUPS[max(0, at - 1) : at + 2] if groups <= jobs and groups != record.best]
        unsure = [groups for groups in beside if record.shares.get(groups, math.inf) > _GAIN]
        if not beside or not record.trials or (not unsure and record.trials < record.pause):
            self.groups = record.best
            return
        record.trials = 0
        if unsure:
            self.groups = unsure[0]
        else:
            self.groups = beside[record.detours % len(beside)]
            record.detours += 1
            record.pause = _longer(record.pause, record.shares[self.groups])

    def _record(self, jobs: int) -> _Record:
        """That of about so many jobs; where nothing was tried with them, what was found with others holds for them."""
        mine = jobs.bit_length()
        record = self._records.setdefault(mine, _Record())
        tried = [about for about, other in self._records.items() if other.shares]
        if tried and not record.shares:
            nearest = self._records[min(tried, key=lambda about: abs(about - mine))]
            record = self._records[mine] = _Record(nearest.best, shares=dict(nearest.shares), trials=record.trials)
        return record

    def _is_poor(self, rate: float) -> bool:
        """Whether it is not worth going on with another number than the best."""
        record = self._records[self._jobs.bit_length()]
        return self.groups != record.best and rate < _POOR * record.rate

    def _conclude(self, rate: float) -> None:
        record = self._records[self._jobs.bit_length()]
        if self.groups == record.best:
            record.rate = rate
            record.trials += 1
            return
        share = rate / record.rate
        known = record.shares.get(self.groups)
        share = share if known is None else known + (share - known) * _SMOOTH
        record.shares[self.groups] = share
        # What seems to be a little better may be so by chance: it is tried twice.
        if share > _SURE or (share > _GAIN and known is not None):
            pause = _longer(_PAUSE, 1 / share)
            self._records[self._jobs.bit_length()] = _Record(self.groups, rate, {record.best: 1 / share}, pause)


def _longer(pause: int, share: float) -> int:
    """The pause after another number was tried that gave so great a share of what the best one does."""
    return min(pause * (_GROWS_FAST if share < _POOR else _GROWS), _LONGEST_PAUSE)
