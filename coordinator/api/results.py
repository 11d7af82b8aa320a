"""Submitted jobs and what came of them, kept within time, number and size. Sans-IO; time is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from coordinator.api.auth import Caller
from coordinator.api.errors import ApiError
from coordinator.api.jobs import Finished
from coordinator.api.responses import usage_object

__all__ = ["KEPT_S", "Results", "Submission", "result_object"]

KEPT_S = 3_600
# Running and ended together, of one account and of all.
MAX_OF_ACCOUNT = 100
MAX_KEPT = 10_000
# Characters of all answers: more than that are only held while they are being written.
MAX_CHARS = 64 * 2**20


@dataclass(eq=False, slots=True)
class Submission:
    """A submitted job; times are unix seconds."""

    job_id: str
    caller: Caller
    model_id: str
    created_at: int
    status: Literal["queued", "running", "done", "failed"] = "queued"
    text: list[str] = field(default_factory=list)
    chars: int = 0
    end: Finished | None = None
    error: ApiError | None = None
    ended_at: int | None = None


class Results:
    """Submissions by job id, in the order in which they came. Those that run are never dropped."""

    def __init__(self) -> None:
        self._kept: dict[str, Submission] = {}
        self._chars = 0

    def add(self, submission: Submission, now: float) -> bool:
        """Keep one; an older result makes room for it. False where only running jobs are in its way."""
        self._drop_old(now)
        own = [each for each in self._kept.values() if each.caller.turn == submission.caller.turn]
        if len(own) >= MAX_OF_ACCOUNT and not self._drop_first(iter(own)):
            return False
        if len(self._kept) >= MAX_KEPT and not self._drop_first(iter(self._kept.values())):
            return False
        self._kept[submission.job_id] = submission
        return True

    def get(self, job_id: str, now: float) -> Submission | None:
        """A job that is still kept."""
        self._drop_old(now)
        return self._kept.get(job_id)

    def write(self, submission: Submission, text: str) -> None:
        """Add to a job's answer; whoever keeps the most loses the oldest where all together are too much."""
        submission.text.append(text)
        submission.chars += len(text)
        self._chars += len(text)
        while self._chars > MAX_CHARS and self._drop_of_the_largest():
            pass

    def drop(self, job_id: str) -> None:
        """Keep a job no longer."""
        if (dropped := self._kept.pop(job_id, None)) is not None:
            self._chars -= dropped.chars

    def _drop_old(self, now: float) -> None:
        for each in [each for each in self._kept.values() if each.ended_at is not None]:
            if now >= (each.ended_at or 0) + KEPT_S:
                self.drop(each.job_id)

    def _drop_first(self, among: Iterator[Submission]) -> bool:
        ended = next((each for each in among if each.ended_at is not None), None)
        if ended is not None:
            self.drop(ended.job_id)
        return ended is not None

    def _drop_of_the_largest(self) -> bool:
        held = Counter[str]()
        for each in self._kept.values():
            if each.ended_at is not None:
                held[each.caller.turn] += each.chars
        (largest, chars), *_ = held.most_common(1) or [("", 0)]
        return chars > 0 and self._drop_first(e for e in self._kept.values() if e.caller.turn == largest and e.chars)


def result_object(submission: Submission) -> dict[str, Any]:
    """A submitted job as JSON."""
    done, error = submission.end, submission.error
    return {
        "object": "job",
        "job_id": submission.job_id,
        "status": submission.status,
        "model_id": submission.model_id,
        "created_at": submission.created_at,
        "ended_at": submission.ended_at,
        "kept_until": submission.ended_at and submission.ended_at + KEPT_S,
        "result": "".join(submission.text) if done else None,
        "finish_reason": done.reason if done else None,
        "usage": usage_object([done.report]) if done else None,
        "error": error.body()["error"] if error else None,
    }
