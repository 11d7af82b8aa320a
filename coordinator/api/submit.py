"""POST /submit and GET /results/<job_id>: an answer that nobody waits for on the line.

Results are kept in memory: until an hour after they were done, and of one account no more than a share. A restart of
the coordinator forgets them; what was put aside for jobs that it ended is given back.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import trio
from pydantic import Field
from quart import Request

from coordinator.api.auth import Caller, Gate
from coordinator.api.completions import Completions
from coordinator.api.errors import ApiError
from coordinator.api.jobs import ChatJob, Delta, Event, Finished, Started
from coordinator.api.requests import ChatMessage, ChatRequest, Strict, parse_body
from coordinator.api.responses import usage_object

__all__ = ["KEPT_S", "Submissions"]

KEPT_S = 3_600
# Of one account, running and done together; and the characters of all results.
_MAX_OF_ACCOUNT = 100
_MAX_CHARS = 64 * 2**20


class SubmitRequest(Strict):
    """A prompt for a model; `est_tokens` bounds the answer's length, and with it the cost."""

    user_pubkey: Annotated[str, Field(max_length=64)] = ""
    model_id: Annotated[str, Field(min_length=1, max_length=300)]
    prompt: Annotated[str, Field(min_length=1)]
    est_tokens: Annotated[int, Field(ge=1)] | None = None


@dataclass(eq=False)
class Submission:
    """A submitted job and what came of it; times are unix seconds."""

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


class Submissions:
    """Takes and runs what is submitted; one for the app. Does so while `run` runs."""

    def __init__(self, completions: Completions, gate: Gate) -> None:
        self._completions = completions
        self._gate = gate
        self._kept: dict[str, Submission] = {}  # in the order in which they came
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the jobs until cancelled, which ends them."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def submit(self, request: Request) -> dict[str, Any]:
        """Take a job; its cost is put aside before this returns.

        Raises:
            ApiError: it cannot be taken: a bad body, no key, too little money, or too many jobs.
        """
        caller = await self._completions.identify(request)
        asked = parse_body(await self._completions.read(request), SubmitRequest)
        caller = self._gate.claim(caller, asked.user_pubkey)
        job = await self._completions.plan(_as_chat(asked), caller)
        submission = Submission(job.requests[0].job_id.hex(), caller, asked.model_id, int(time.time()))
        if self._nursery is None or not self._make_room(caller):
            raise _too_many()
        await self._nursery.start(self._work, job, submission)
        return result_object(submission)

    def result(self, caller: Caller, job_id: str) -> dict[str, Any]:
        """Where a job stands, and its answer once it is done.

        Raises:
            ApiError: status 404 where the caller submitted no such job, or its result is not kept any more.
        """
        self._forget_old()
        found = self._kept.get(job_id)
        if found is None or found.caller.wallet != caller.wallet:
            raise ApiError(
                "There is no such job of yours",
                status=404,
                code="job_not_found",
                remedy=f"Results are kept for {KEPT_S // 60} minutes, and until the coordinator restarts.",
            )
        return result_object(found)

    async def _work(self, job: ChatJob, mine: Submission, *, task_status: trio.TaskStatus[None]) -> None:
        async def collect(event: Event) -> None:
            if isinstance(event, Started):
                mine.status = "running"
            elif isinstance(event, Delta):
                mine.text.append(event.text)
                mine.chars += len(event.text)
                self._forget_most()
            elif isinstance(event, Finished):
                mine.end = event

        async with self._completions.reserved(job):
            self._kept[mine.job_id] = mine
            task_status.started()
            try:
                await self._completions.run(job, collect)
                mine.status = "done"
            except ApiError as error:
                mine.status, mine.error = "failed", error
            finally:
                mine.ended_at = int(time.time())

    def _make_room(self, caller: Caller) -> bool:
        """Whether the account may have one more; its oldest result goes where it has the most that it may."""
        self._forget_old()
        own = [each for each in self._kept.values() if each.caller.turn == caller.turn]
        if len(own) < _MAX_OF_ACCOUNT:
            return True
        oldest = next((each for each in own if each.ended_at is not None), None)
        if oldest is not None:
            del self._kept[oldest.job_id]
        return oldest is not None

    def _forget_old(self) -> None:
        limit = time.time() - KEPT_S
        for each in [each for each in self._kept.values() if each.ended_at is not None and each.ended_at < limit]:
            del self._kept[each.job_id]

    def _forget_most(self) -> None:
        """Keep the results' size in bounds: whoever has the most loses the oldest."""
        while sum(each.chars for each in self._kept.values()) > _MAX_CHARS:
            held = Counter[str]()
            for each in self._kept.values():
                held[each.caller.turn] += each.chars if each.ended_at is not None else 0
            ((turn, chars),) = held.most_common(1)
            if not chars:
                return  # all of it is still being written, within the bound of the running jobs
            ended = (e for e in self._kept.values() if e.caller.turn == turn and e.chars and e.ended_at is not None)
            del self._kept[next(ended).job_id]


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


def _as_chat(asked: SubmitRequest) -> ChatRequest:
    message = ChatMessage.model_validate({"role": "user", "content": asked.prompt})
    return ChatRequest(model=asked.model_id, messages=[message], max_completion_tokens=asked.est_tokens)


def _too_many() -> ApiError:
    return ApiError(
        "Too many submitted jobs wait or run",
        status=429,
        code="too_many_jobs",
        remedy="Submit it again once one of yours is done.",
        headers={"Retry-After": "10"},
    )
