"""Answers as they are put together, and those that are kept, as JSON."""

from __future__ import annotations

import json
from typing import Any

from azu.accounts.submitted import KEPT_S, Submitted
from coordinator.api.errors import ApiError
from coordinator.api.jobs import Delta, Event, Finished
from coordinator.api.responses import Answer, usage_object

__all__ = ["Collected", "failure_of", "failure_outcome", "result_object"]

_NOTHING = {"result": None, "finish_reason": None, "usage": None, "error": None}


class Collected:
    """The events of a request's jobs, until all have ended."""

    def __init__(self, choices: int) -> None:
        self._texts = [""] * choices
        self._ends: dict[int, Finished] = {}

    async def take(self, event: Event) -> None:
        """One more event."""
        if isinstance(event, Delta):
            self._texts[event.index] += event.text
        elif isinstance(event, Finished):
            self._ends[event.index] = event

    def completion(self, answer: Answer) -> dict[str, Any]:
        """OpenAI's object of the whole answer."""
        ends = [self._ends[index] for index in range(len(self._texts))]
        choices = [(text, end.reason) for text, end in zip(self._texts, ends, strict=True)]
        return answer.completion(choices, [end.report for end in ends])

    def outcome(self) -> str:
        """What came of a submitted job that is complete."""
        end = self._ends[0]
        usage = usage_object([end.report])
        return json.dumps({**_NOTHING, "result": self._texts[0], "finish_reason": end.reason, "usage": usage})


def failure_outcome(error: ApiError) -> str:
    """What came of a job that failed."""
    return json.dumps({**_NOTHING, "error": error.body()["error"], "status": error.status})


def failure_of(outcome: dict[str, Any]) -> ApiError:
    """The failure that a job ended with."""
    error = outcome["error"]
    return ApiError(error["message"], status=outcome["status"], code=error["code"], details=error.get("azu"))


def result_object(job: Submitted) -> dict[str, Any]:
    """A submitted job, and what came of it, if it has ended."""
    outcome = json.loads(job.outcome) if job.outcome else {}
    return {
        "object": "job",
        "job_id": job.job_id,
        "status": job.status,
        "model_id": job.model_id,
        "created_at": job.created_at,
        "ended_at": job.ended_at,
        "kept_until": job.ended_at and job.ended_at + KEPT_S,
        **{name: outcome.get(name) for name in _NOTHING},
    }
