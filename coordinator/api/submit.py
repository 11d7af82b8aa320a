"""POST /submit and GET /results/<job_id>: an answer that nobody waits for on the line.

Results are kept in memory, within the bounds of `results`. A restart of the coordinator forgets them; what was put
aside for jobs that it ended is given back.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import trio
from pydantic import Field
from quart import Request

from coordinator.api.auth import Caller, Gate
from coordinator.api.completions import Completions
from coordinator.api.errors import ApiError, from_exception
from coordinator.api.jobs import ChatJob, Delta, Event, Finished, Started
from coordinator.api.requests import ChatMessage, ChatRequest, Strict, parse_body
from coordinator.api.results import KEPT_S, Results, Submission, result_object
from coordinator.api.settings import ApiSettings

__all__ = ["Submissions"]

_RETRY_S = 10


class SubmitRequest(Strict):
    """A prompt for a model; `est_tokens` bounds the answer's length, and with it the cost."""

    user_pubkey: Annotated[str, Field(max_length=64)] = ""
    model_id: Annotated[str, Field(min_length=1, max_length=300)]
    prompt: Annotated[str, Field(min_length=1)]
    est_tokens: Annotated[int, Field(ge=1)] | None = None


class Submissions:
    """Takes and runs what is submitted; one for the app. Does so while `run` runs."""

    def __init__(self, completions: Completions, gate: Gate) -> None:
        self._completions = completions
        self._gate = gate
        self._results = Results()
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
        if self._nursery is None or not self._results.add(submission, time.time()):
            raise _too_many()
        try:
            await self._nursery.start(self._work, job, submission)
        except BaseException:
            self._results.drop(submission.job_id)
            raise
        return result_object(submission)

    def result(self, caller: Caller, job_id: str) -> dict[str, Any]:
        """Where a job stands, and its answer once it is done.

        Raises:
            ApiError: status 404 where the caller submitted no such job, or its result is not kept any more.
        """
        found = self._results.get(job_id, time.time())
        if found is None or found.caller.turn != caller.turn:  # the wallet, or the address where there is none
            raise ApiError(
                "There is no such job of yours",
                status=404,
                code="job_not_found",
                remedy=f"Results are kept for {KEPT_S // 60} minutes, and until the coordinator restarts.",
            )
        return result_object(found)

    async def _work(self, job: ChatJob, mine: Submission, *, task_status: trio.TaskStatus[None]) -> None:
        is_taken = False
        try:
            async with self._completions.reserved(job):
                is_taken = True
                task_status.started()
                await self._collect(job, mine)
            mine.status = "done"
        except Exception as error:  # the border: nobody waits for it any more
            if not is_taken:
                raise
            mine.status, mine.error = "failed", from_exception(error, ApiSettings())
        finally:
            mine.ended_at = int(time.time())

    async def _collect(self, job: ChatJob, mine: Submission) -> None:
        async def collect(event: Event) -> None:
            if isinstance(event, Started):
                mine.status = "running"
            elif isinstance(event, Delta):
                self._results.write(mine, event.text)
            elif isinstance(event, Finished):
                mine.end = event

        await self._completions.run(job, collect)


def _as_chat(asked: SubmitRequest) -> ChatRequest:
    message = ChatMessage.model_validate({"role": "user", "content": asked.prompt})
    return ChatRequest(model=asked.model_id, messages=[message], max_completion_tokens=asked.est_tokens)


def _too_many() -> ApiError:
    return ApiError(
        "Too many submitted jobs wait or run",
        status=429,
        code="too_many_jobs",
        remedy="Submit it again once one of yours is done.",
        headers={"Retry-After": str(_RETRY_S)},
    )
