"""Requests that outlive the coordinator's process: noted while they run, and gone on with after a restart, or by
another coordinator that shares the ledger.

A stream waits for its client, and is ended if that does not come; a whole answer, which nobody can get any more, is
ended at once. What had been sampled is settled then. Answers that are fetched later go on by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from azu.accounts.kept import Claimed, KeptHead, KeptRequests, Lead
from azu.errors import AzuError, InternalError
from azu.logs import log
from azu.tickets import JobTicket
from azu.wire.messages import KEEP_S
from azu.wire.tokens import pack_tokens, unpack_tokens
from coordinator.agreement import Handover
from coordinator.api.errors import ApiError, from_exception
from coordinator.api.settings import ApiSettings
from coordinator.generation import JobReport, SampledToken
from coordinator.journal import Asked, Ended, Kind, Left, Standing, Unfinished, row_of

__all__ = ["CLAIM_S", "Kept", "Replay", "Unclaimed", "no_such_stream", "replayed"]

logger = logging.getLogger(__name__)

# After a restart, streams wait for their clients so long. Workers keep jobs for longer (`azu.wire.messages.KEEP_S`).
CLAIM_S = 60.0
_LOOK_S = 1.0
_ASK_S = 5.0
_AGAIN_S = 5.0
_TRIES = 3
# Chains of workers that one coordinator tries for a job at most: each has a job id of its own, and no worker takes one
# twice.
_CHAINS = 16


class Kept:
    """One request in the journal, while this coordinator leads it.

    Args:
        lead: under which it is noted already.

    Attributes:
        standings: how its jobs stand, by choice.
        is_let_go: whether its jobs are left to their stages, as this process ends.
    """

    def __init__(
        self, journal: KeptRequests, asked: Asked, standings: Sequence[Standing] = (), lead: Lead | None = None
    ) -> None:
        self.asked = asked
        self.standings = list(standings) or [Standing()] * len(asked.job_ids)
        self.is_let_go = False
        self._journal = journal
        self.lead = lead
        self._life = journal.presence.life
        self._is_lost = False
        self._turn = trio.Lock()

    @classmethod
    def of(cls, journal: KeptRequests, unfinished: Unfinished) -> Kept:
        """One that was claimed. A stream that does not come so far as to run here is left to whoever claims it next."""
        kept = cls(journal, unfinished.asked, unfinished.standings, unfinished.lead)
        kept.is_let_go = unfinished.asked.kind == "stream"
        return kept

    @property
    def first_chain(self) -> int:
        """The number of the next chain that is tried for one of its jobs."""
        return 0 if self.lead is None else (self.lead.term - 1) * _CHAINS

    def outlives(self, *, is_stopped: bool) -> bool:
        """Whether its jobs are to be left to their stages now that they are cancelled, as the coordinator stops or not.

        Nothing but the end of the process cancels what is fetched later.
        """
        is_stream = self.asked.kind == "stream"
        return self.lead is not None and (self._is_fetched_later or (is_stopped and is_stream))

    @property
    def _is_fetched_later(self) -> bool:
        return self.asked.kind in ("submitted", "once")

    def begins_anew(self, number: int) -> bool:
        """Whether a job whose tokens nobody knows any more is run once more: nobody has seen any of them."""
        if not (self._is_fetched_later and self.standings[number].ticket):
            return False
        self.standings[number] = Standing()
        return True

    async def note(self, number: int, ticket: JobTicket, handovers: Sequence[Handover]) -> bool:
        """Note by what a job can be taken up; False where it is led elsewhere now."""
        before = self.standings[number].ticket
        standing = Standing(ticket=ticket.to_cbor(), left=tuple(map(Left.of, handovers)))
        self.standings[number] = standing
        async with self._turn:
            if self.lead is None:
                try:
                    with trio.CancelScope(shield=True):  # else it might be written, and nobody would know
                        self.lead = await self._journal.begin(row_of(self.asked, self.standings))
                except InternalError as error:  # it does not outlive this process, then
                    log(logger, logging.WARNING, "request not noted", job=ticket.job_id.hex(), reason=error.message)
                return True
        # Where others are alive, they may lead it by now, and must not find two tickets of one epoch.
        is_needed = standing.ticket != before and bool(self._journal.presence.others())
        if not await self._write(self.lead, number, is_needed=is_needed):
            self._is_lost = True
        return not self._is_lost

    async def leads(self) -> bool:
        """Whether its jobs are this coordinator's to end and to settle.

        So they are while the database is away: nobody claims anything then, and a settlement waits for it anyway.
        """
        if self.lead is None:
            return True
        presence = self._journal.presence
        if not self._is_lost and not (presence.is_sure and presence.life == self._life):
            try:
                with trio.move_on_after(_ASK_S):
                    self._is_lost = not await self._journal.leads(self.lead)
            except InternalError as error:
                log(logger, logging.WARNING, "not known who leads a request", reason=error.message)
        return not self._is_lost

    async def note_end(self, number: int, tokens: Sequence[SampledToken], report: JobReport) -> None:
        """Note a job that is complete while others of the request may not be."""
        is_last_special = bool(tokens) and tokens[-1].finish == "stop"
        ids = pack_tokens([each.token for each in tokens])
        ended = Ended.of(ids, report, is_last_special=is_last_special)
        self.standings[number] = self.standings[number].model_copy(update={"ended": ended})
        if self.lead is not None and len(self.standings) > 1:
            await self._write(self.lead, number)

    async def _write(self, lead: Lead, number: int, *, is_needed: bool = False) -> bool:
        """Write down how a job stands; False where it is led elsewhere. No job ends since the database is away: it goes
        on, and can be taken up only by what was written before; or waits, if that is needed.
        """
        while True:
            try:
                with trio.move_on_after(_ASK_S):
                    return await self._journal.note(lead, number, self.standings[number].to_cbor())
            except InternalError as error:
                job = self.asked.job_ids[number].hex()
                log(logger, logging.WARNING, "standing of a job not noted", job=job, reason=error.message)
            if not is_needed:
                return True
            await trio.sleep(_LOOK_S)

    async def close(self) -> None:
        """Nothing runs here any more: forget it, unless it is let go, or kept until its answer is."""
        if self.lead is None:
            return
        try:
            if self.is_let_go:
                await self._journal.let_go(self.lead)
            elif self.asked.kind in ("stream", "whole"):
                await self._journal.forget(self.lead)
        except InternalError as error:  # the next start finds it
            log(logger, logging.WARNING, "request not closed", reason=error.message)


class Replay:
    """A job that is complete; a `coordinator.generation.Generation`."""

    def __init__(self, ended: Ended) -> None:
        self._ended = ended
        self._report = ended.job_report()

    @property
    def job_id(self) -> str:
        """As the client and the ledger know it."""
        return self._report.job_id

    async def tokens(self) -> AsyncIterator[SampledToken]:
        """All of its tokens, the last of which ends it."""
        tokens = unpack_tokens(self._ended.tokens)
        for token in tokens[:-1]:
            await trio.lowlevel.checkpoint()
            yield SampledToken(token, "")
        yield SampledToken(tokens[-1], "stop" if self._ended.is_last_special else "length")

    async def finish(self) -> JobReport:
        """What was settled."""
        await trio.lowlevel.checkpoint()
        return self._report

    def let_go(self) -> None:
        """There is nothing to be left."""


@asynccontextmanager
async def replayed(ended: Ended) -> AsyncIterator[Replay]:
    """A job that is complete, as one that runs."""
    await trio.lowlevel.checkpoint()
    yield Replay(ended)


Handler = Callable[[Unfinished], Awaitable[None]]


class Unclaimed:
    """Requests that nobody leads: each is handed to its client, or to whoever deals with its kind.

    Args:
        is_served: whether this coordinator serves the model of this digest.
        give_up: ends what cannot be gone on with.
        is_stopping: whether nothing more is to be taken up.

    Attributes:
        handlers: by kind; each is called in a task of `run`.
    """

    def __init__(
        self,
        journal: KeptRequests,
        is_served: Callable[[str], bool],
        give_up: Handler,
        is_stopping: Callable[[], bool],
    ) -> None:
        self.handlers: dict[Kind, Handler] = {}
        self._is_stopping = is_stopping
        self._journal = journal
        self._presence = journal.presence
        self._is_served = is_served
        self._give_up = give_up
        self._left: set[str] = set()  # requests that others may go on with, and this coordinator may not

    async def claim(self, stream: str, wallet: str) -> Unfinished:
        """Hand a stream to its client, once; one whose leader seems to live is waited for until it is known.

        Raises:
            ApiError: status 404 where none of its wallet waits, 409 where another coordinator has it.
        """
        for _ in range(_TRIES):  # its leader may be another one each time
            found = await self._journal.find(stream)
            if found is None or (found.kind, found.wallet) != ("stream", wallet) or not self._is_served(found.manifest):
                break
            if (leader := found.leader) is None or self._presence.is_gone(leader):
                if (claimed := await self._claim(stream)) is not None:
                    return claimed
                if stream in self._left:
                    raise _elsewhere("", "")
            elif leader == self._presence.me or await self._presence.lives(leader):
                raise _elsewhere(leader, self._presence.url_of(leader))
        raise no_such_stream()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take up, or end, what waits, until cancelled; reports by `task_status` when all that an earlier life of this
        coordinator led can be claimed.
        """
        await self._journal.let_go_all()
        task_status.started()
        since: dict[str, float] = {}
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    await self._look(nursery, since)
                except AzuError as error:  # a border: the database is away
                    log(logger, logging.WARNING, "waiting requests not looked at", reason=error.message)
                await trio.sleep(_LOOK_S)

    async def _look(self, nursery: trio.Nursery, since: dict[str, float]) -> None:
        now = trio.current_time()
        waiting = {each.request_id: each for each in await self._journal.waiting()}
        self._left &= waiting.keys()
        for gone in since.keys() - waiting.keys():
            del since[gone]
        for request_id, each in waiting.items():
            waited = now - since.setdefault(request_id, now)
            is_old = waited >= KEEP_S  # no worker has it any more, so that it does not matter who goes on with it
            is_due = is_old or (waited >= self._patience(each) and request_id not in self._left)
            if self._is_stopping() or not is_due:
                continue
            if (claimed := await self._claim(request_id, is_old=is_old)) is not None:
                log(logger, logging.INFO, "request taken over", kind=each.kind, jobs=len(claimed.standings))
                nursery.start_soon(self._handle, claimed)

    async def _claim(self, request_id: str, *, is_old: bool = False) -> Unfinished | None:
        with trio.CancelScope(shield=True):  # else this coordinator might lead what nobody here knows of
            row = await self._journal.claim(request_id)
            if row is not None:
                return await self._accepted(row, is_old=is_old)
        return None

    async def _accepted(self, row: Claimed, *, is_old: bool) -> Unfinished | None:
        """A request that this coordinator may go on with: those who signed its tickets named it."""
        try:
            claimed = Unfinished.of(row)
            tickets = [each.job_ticket() for each in claimed.standings]
        except AzuError as error:
            log(logger, logging.WARNING, "noted request is damaged", reason=error.message)
            await self._journal.forget(row.lead)
            return None
        if all(ticket is None or ticket.may_be_led_by(self._presence.me) for ticket in tickets):
            return claimed
        if is_old:
            return claimed.begun_anew()
        self._left.add(row.lead.request_id)
        await self._journal.let_go(row.lead)
        return None

    def _patience(self, each: KeptHead) -> float:
        """Seconds for which it is left to others, first of all to its client."""
        if not self._is_served(each.manifest):
            return KEEP_S
        return CLAIM_S if each.kind == "stream" else 0.0

    async def _handle(self, claimed: Unfinished) -> None:
        try:
            await self.handlers[claimed.asked.kind](claimed)
        except Exception as error:  # a border: there is nobody to be told
            reason = from_exception(error, ApiSettings()).message
            log(logger, logging.WARNING, "request not gone on with", reason=reason)
            await self._end(claimed)

    async def _end(self, claimed: Unfinished) -> None:
        while True:
            try:
                return await self._give_up(claimed)
            except AzuError as error:  # the database is away
                log(logger, logging.WARNING, "request not ended yet", reason=error.message)
                await trio.sleep(_AGAIN_S)


def no_such_stream() -> ApiError:
    """What a client gets that cannot go on."""
    return ApiError(
        "No such stream waits to be gone on with",
        status=404,
        code="stream_not_found",
        remedy=f"After a restart, streams wait for {CLAIM_S:.0f} s. Send the request again.",
    )


def _elsewhere(peer_id: str, url: str) -> ApiError:
    where = f": {peer_id}{f' at {url}' if url else ''}" if peer_id else ""
    return ApiError(
        f"Another connection, or another coordinator, has this stream{where}",
        status=409,
        code="stream_elsewhere",
        remedy="Go on with it there, or here once that is gone.",
        details={"coordinator": peer_id, "url": url},
        headers={"Retry-After": "5"},
    )
