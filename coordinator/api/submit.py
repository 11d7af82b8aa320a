"""POST /submit and GET /results/<job_id>: an answer that nobody waits for on the line.

Results are kept in the ledger's database for a while (`azu.accounts.submitted`), where any coordinator that shares it
finds them. A restart ends the jobs that run; what was put aside for them is given back.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Annotated, Any, Literal

import trio
from pydantic import Field
from quart import Request

from azu.accounts.submitted import KEPT_S, Submitted, SubmittedJobs
from azu.errors import InternalError
from azu.ledger import Ledger
from azu.logs import log
from coordinator.api.auth import Caller, Gate
from coordinator.api.completions import Completions
from coordinator.api.errors import ApiError, from_exception
from coordinator.api.jobs import ChatJob, Delta, Event, Finished, Started
from coordinator.api.requests import ChatMessage, ChatRequest, Strict, parse_body
from coordinator.api.results import failure_outcome, outcome_of, result_object
from coordinator.api.settings import ApiSettings

__all__ = ["Submissions"]

logger = logging.getLogger(__name__)

_RETRY_S = 10
_JOB_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


class SubmitRequest(Strict):
    """A prompt for a model; `est_tokens` bounds the answer's length, and with it the cost."""

    user_pubkey: Annotated[str, Field(max_length=64)] = ""
    model_id: Annotated[str, Field(min_length=1, max_length=300)]
    prompt: Annotated[str, Field(min_length=1)]
    est_tokens: Annotated[int, Field(ge=1)] | None = None


class Submissions:
    """Takes and runs what is submitted; one for the app. Does so while `run` runs."""

    def __init__(self, completions: Completions, gate: Gate, ledger: Ledger) -> None:
        self._completions = completions
        self._gate = gate
        self._owner = ledger.owner
        self._jobs = SubmittedJobs(ledger)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the jobs until cancelled, which ends them."""
        await self._jobs.end_all_of(self._owner, failure_outcome(_forgotten()), int(time.time()))
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
        now = int(time.time())
        mine = Submitted(job.requests[0].job_id.hex(), caller.turn, self._owner, asked.model_id, now)
        if self._nursery is None or not await self._jobs.add(mine, now):
            raise _too_many()
        try:
            await self._nursery.start(self._work, job, mine)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._jobs.drop(mine.job_id)
            raise
        return result_object(mine)

    async def result(self, caller: Caller, job_id: str) -> dict[str, Any]:
        """Where a job stands, and its answer once it is done.

        Raises:
            ApiError: status 404 where the caller submitted no such job, or its result is not kept any more.
        """
        found = await self._jobs.find(job_id, int(time.time())) if _JOB_ID.fullmatch(job_id) else None
        if found is None or found.account != caller.turn:  # the wallet, or the address where there is none
            raise ApiError(
                "There is no such job of yours",
                status=404,
                code="job_not_found",
                remedy=f"Results are kept for {KEPT_S // 60} minutes.",
            )
        return result_object(found)

    async def _work(self, job: ChatJob, mine: Submitted, *, task_status: trio.TaskStatus[None]) -> None:
        text: list[str] = []
        ends: list[Finished] = []

        async def collect(event: Event) -> None:
            if isinstance(event, Started):
                await self._jobs.start(mine.job_id)
            elif isinstance(event, Delta):
                text.append(event.text)
            elif isinstance(event, Finished):
                ends.append(event)

        is_taken = False
        try:
            async with self._completions.reserved(job):
                is_taken = True
                task_status.started()
                await self._completions.run(job, collect)
            await self._end(mine, "done", outcome_of(text, ends[0]))
        except Exception as error:  # the border: nobody waits for it any more
            if not is_taken:
                raise
            await self._end(mine, "failed", failure_outcome(from_exception(error, ApiSettings())))

    async def _end(self, mine: Submitted, status: Literal["done", "failed"], outcome: str) -> None:
        try:
            await self._jobs.end(mine, status, outcome, int(time.time()))
        except InternalError as error:  # it stays as it is, until the next start
            log(logger, logging.ERROR, "result not kept", job=mine.job_id, reason=error.message)


def _as_chat(asked: SubmitRequest) -> ChatRequest:
    message = ChatMessage.model_validate({"role": "user", "content": asked.prompt})
    return ChatRequest(model=asked.model_id, messages=[message], max_completion_tokens=asked.est_tokens)


def _forgotten() -> ApiError:
    return ApiError(
        "The coordinator restarted while this job ran",
        status=503,
        code="restarted",
        remedy="Submit it again; nothing was charged that was not generated.",
    )


def _too_many() -> ApiError:
    return ApiError(
        "Too many submitted jobs wait or run",
        status=429,
        code="too_many_jobs",
        remedy="Submit it again once one of yours is done.",
        headers={"Retry-After": str(_RETRY_S)},
    )
