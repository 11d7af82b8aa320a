"""Submitted jobs as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from azu.accounts.submitted import KEPT_S, Submitted
from coordinator.api.errors import ApiError
from coordinator.api.jobs import Finished
from coordinator.api.responses import usage_object

__all__ = ["failure_outcome", "outcome_of", "result_object"]

_NOTHING = {"result": None, "finish_reason": None, "usage": None, "error": None}


def outcome_of(text: Sequence[str], end: Finished) -> str:
    """What came of a job that is complete."""
    return json.dumps(
        {**_NOTHING, "result": "".join(text), "finish_reason": end.reason, "usage": usage_object([end.report])}
    )


def failure_outcome(error: ApiError) -> str:
    """What came of a job that failed."""
    return json.dumps({**_NOTHING, "error": error.body()["error"]})


def result_object(job: Submitted) -> dict[str, Any]:
    """A submitted job, and what came of it, if it has ended."""
    return {
        "object": "job",
        "job_id": job.job_id,
        "status": job.status,
        "model_id": job.model_id,
        "created_at": job.created_at,
        "ended_at": job.ended_at,
        "kept_until": job.ended_at and job.ended_at + KEPT_S,
        **(json.loads(job.outcome) if job.outcome else _NOTHING),
    }
