"""POST /submit and GET /results/<job_id>: an answer that nobody waits for on the line. And whole answers that are asked
for with an `Idempotency-Key`: whoever asks again with it gets the same one, and pays once.

Both are jobs that run by themselves; a restart of the coordinator interrupts them, and no more. Results are kept in the
ledger's database for a while (`azu.accounts.submitted`), where any coordinator that shares it finds them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from functools import partial
from typing import Annotated, Any, Literal

import trio
from pydantic import Field
from quart import Request

from azu.accounts.kept import KeptRequests, Lead
from azu.accounts.submitted import KEPT_S, Submitted, SubmittedJobs
from azu.errors import InternalError
from azu.ledger import Ledger
from azu.logs import log
from coordinator.api.auth import Caller, Gate
from coordinator.api.completions import Completions
from coordinator.api.errors import ApiError, from_exception, restarting
from coordinator.api.jobs import ChatJob, Event, Started
from coordinator.api.kept import Kept
from coordinator.api.requests import ChatMessage, ChatRequest, Strict, parse_body
from coordinator.api.responses import Answer
from coordinator.api.results import Collected, failure_of, failure_outcome, result_object
from coordinator.api.settings import ApiSettings
from coordinator.journal import Kind, Unfinished, row_of

__all__ = ["Submissions"]

logger = logging.getLogger(__name__)

_RETRY_S = 10
_LOOK_S = 0.5
_AGAIN_S = 5.0
_JOB_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
# Of a key; a UUID has 36 characters.
_KEY = re.compile(r"[!-~]{1,255}", re.ASCII)


class SubmitRequest(Strict):
    """A prompt for a model; `est_tokens` bounds the answer's length, and with it the cost."""

    user_pubkey: Annotated[str, Field(max_length=64)] = ""
    model_id: Annotated[str, Field(min_length=1, max_length=300)]
    prompt: Annotated[str, Field(min_length=1)]
    est_tokens: Annotated[int, Field(ge=1)] | None = None


class Submissions:
    """Takes and runs what is submitted; one for the app. Does so while `run` runs."""

    def __init__(self, completions: Completions, gate: Gate, ledger: Ledger, journal: KeptRequests) -> None:
        self._completions = completions
        self._gate = gate
        self._owner = ledger.owner
        self._journal = journal
        self._jobs = SubmittedJobs(ledger)
        self._nursery: trio.Nursery | None = None
        self._running: dict[str, trio.Event] = {}  # set when a job has ended, by its id
        completions.answer_once = self._answer_once
        if completions.unclaimed is not None:
            completions.unclaimed.handlers |= {"submitted": self._go_on, "once": self._go_on}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the jobs until cancelled, which leaves them to their workers."""
        await self._jobs.end_forgotten(self._owner, failure_outcome(_forgotten()), int(time.time()))
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
        return result_object(await self._take(job, "submitted"))

    async def _answer_once(self, job: ChatJob, asked: ChatRequest, key: str) -> dict[str, object]:
        """The whole answer to a request that its client names by a key, whether it is new, runs, or is done.

        Raises:
            ApiError: a bad key, one of another request, or what came of the job.
        """
        if _KEY.fullmatch(key) is None:
            raise ApiError("Idempotency-Key has to be 1 to 255 printable characters", code="invalid_idempotency_key")
        account, digest = job.requests[0].account, _digest(asked.model_dump_json())
        found = await self._take(job, "once", idempotency=_digest(f"{account}\n{key}"), asked=digest)
        if found.asked != digest:
            raise _another_request()
        with self._completions.in_flight.scope():
            return await self._outcome_of(found.job_id)
        raise restarting("Send the request again with the same Idempotency-Key.")

    async def _outcome_of(self, job_id: str) -> dict[str, object]:
        while True:
            found = await self._jobs.find(job_id, int(time.time()))
            if found is None:
                raise ApiError("The answer is not kept any more", status=503, code="not_kept", remedy="Send it again.")
            if found.ended_at is not None:
                break
            if (ended := self._running.get(job_id)) is not None:
                await ended.wait()
            else:  # it runs elsewhere, or waits to be taken up
                await trio.sleep(_LOOK_S)
        outcome = json.loads(found.outcome)
        if found.status == "failed":
            raise failure_of(outcome)
        completion: dict[str, object] = outcome["completion"]
        return completion

    async def _take(self, job: ChatJob, kind: Kind, *, idempotency: str = "", asked: str = "") -> Submitted:
        """Begin a job, and return when its cost is put aside; or find that which was begun with the same key."""
        job = self._completions.kept(job, kind, answer := Answer(job.model))
        first, kept = job.requests[0], job.kept
        mine = Submitted(
            first.job_id.hex(),
            first.account,
            self._owner,
            job.model.model_id,
            answer.created,
            idempotency=idempotency,
            asked=asked,
        )
        if self._nursery is None or kept is None:
            raise _too_many()
        note = partial(self._journal.insert, row=row_of(kept.asked, kept.standings))
        with trio.CancelScope(shield=True):  # else it might be kept, and nobody would run it
            found = await self._jobs.add(mine, answer.created, note)
        if found is None:
            raise _too_many()
        if found.job_id == mine.job_id:
            kept.lead = Lead(kept.asked.request_id)
            try:
                await self._nursery.start(self._work, job, kept)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._jobs.drop(mine.job_id, partial(self._journal.remove, lead=kept.lead))
                    await self._completions.release(kept.asked)
                raise
        return found

    async def result(self, caller: Caller, job_id: str) -> dict[str, Any]:
        """Where a job stands, and its answer once it is done.

        Raises:
            ApiError: status 404 where the caller submitted no such job, or its result is not kept any more.
        """
        found = await self._jobs.find(job_id, int(time.time())) if _JOB_ID.fullmatch(job_id) else None
        if (
            found is None or found.account != caller.turn or found.idempotency
        ):  # the wallet, or the address where there is none
            raise ApiError(
                "There is no such job of yours",
                status=404,
                code="job_not_found",
                remedy=f"Results are kept for {KEPT_S // 60} minutes.",
            )
        return result_object(found)

    async def _go_on(self, unfinished: Unfinished) -> None:
        """Have a job of before the restart run to its end."""
        try:
            job = await self._completions.taken_up(unfinished)
            if job.kept is not None:
                await self._work(job, job.kept)
        except Exception as error:  # the border, as below: it was not even begun
            await self._completions.release(unfinished.asked)
            await self._end(unfinished.asked.job_ids[0].hex(), unfinished.lead, from_exception(error, ApiSettings()))

    async def _work(
        self, job: ChatJob, kept: Kept, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        collected, job_id = Collected(len(job.requests)), job.requests[0].job_id.hex()

        async def take(event: Event) -> None:
            if isinstance(event, Started):
                await self._jobs.start(job_id)
            await collected.take(event)

        is_taken = False
        self._running[job_id] = ended = trio.Event()
        try:
            async with self._completions.reserved(job):
                is_taken = True
                task_status.started()
                await self._completions.run(job, take)
            if kept.asked.kind == "submitted":
                outcome = collected.outcome()
            else:
                outcome = json.dumps({"completion": collected.completion(Answer(job.model, kept.asked.created))})
            await self._end(job_id, kept.lead, outcome)
        except Exception as error:  # the border: nobody waits for it any more
            if not is_taken:
                raise
            if not kept.is_let_go:
                await self._end(job_id, kept.lead, from_exception(error, ApiSettings()))
        finally:
            del self._running[job_id]
            ended.set()

    async def _end(self, job_id: str, lead: Lead | None, came: str | ApiError) -> None:
        status: Literal["done", "failed"] = "done" if isinstance(came, str) else "failed"
        outcome = came if isinstance(came, str) else failure_outcome(came)
        forget = partial(self._journal.remove, lead=lead or Lead(""))
        while True:
            try:
                return await self._jobs.end(job_id, status, outcome, int(time.time()), forget)
            except InternalError as error:  # the database is away, and the job may be paid for
                log(logger, logging.WARNING, "result not kept yet", job=job_id, reason=error.message)
                await trio.sleep(_AGAIN_S)


def _as_chat(asked: SubmitRequest) -> ChatRequest:
    message = ChatMessage.model_validate({"role": "user", "content": asked.prompt})
    return ChatRequest(model=asked.model_id, messages=[message], max_completion_tokens=asked.est_tokens)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _another_request() -> ApiError:
    return ApiError(
        "Another request was sent with this Idempotency-Key",
        status=422,
        code="idempotency_key_reused",
        remedy="Use a fresh random key for each request, and the same only to send that request again.",
    )


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
