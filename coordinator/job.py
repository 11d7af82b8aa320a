"""One running job as the coordinator sees it: a stream to each stage, token ids coming back, receipts at the end.

A stage that is lost, or has become slow, is replaced, and the client sees a pause: `coordinator/mender.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from azu.channel import RefusedError
from azu.errors import AzuError, ProtocolError
from azu.identity import Identity
from azu.overlay import Overlay
from azu.tickets import JobTicket
from azu.wire.messages import (
    KEEP_S,
    LEAVING,
    Failed,
    Inherited,
    Leaving,
    Message,
    Paused,
    Ping,
    Ready,
    Token,
    Waiting,
)
from coordinator.agreement import Handover
from coordinator.answer import Answer
from coordinator.attendance import Attendance
from coordinator.crew import Crew
from coordinator.generation import JobReport, Note, SampledToken, known_as
from coordinator.mender import Mender, OnLeaving, OnLost
from coordinator.meter import Meter, read_job
from coordinator.reserves import Reserves

__all__ = ["RunningJob"]

# Stages have this long to answer the end of a job with their receipt.
_RECEIPT_S = 5.0
# A job's tokens come on two streams of one connection. What is read first of one may be so many tokens ahead of what is
# still to be read of the other, and for so long.
_MAX_EARLY, _EARLY_S = 16, 5.0


class RunningJob:
    """A job in flight; implements `coordinator.generation.Generation`.

    Args:
        vocab_size: token ids are below this.
        pace: seconds that a position takes through all stages, as their workers measured.
        note, leads: see `GenerationRequest`.
        is_back: its stages have kept it while this coordinator was away.
        handovers: of stages that were left properly before that.
    """

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        ticket: JobTicket,
        prompt: tuple[int, ...],
        meter: Meter,
        *,
        vocab_size: int,
        pace: float,
        on_lost: OnLost,
        on_leaving: OnLeaving,
        reserves: Reserves,
        note: Note | None = None,
        leads: Callable[[], Awaitable[bool]] | None = None,
        is_back: bool = False,
        handovers: Sequence[Handover] = (),
    ) -> None:
        self.is_abandoned = False  # before its first token, to another chain, which settles it
        self.report: JobReport | None = None  # once it has ended
        self._note = note
        self._leads = leads
        self._is_back = is_back
        self._is_let_go = False
        self._prompt = prompt
        self._meter = meter
        self._vocab_size = vocab_size
        self._early: dict[int, tuple[int, str | None]] = {}  # by index: tokens, and how they end it, if told
        self._early_since = 0.0  # in trio's time
        self._answer = Answer(ticket)
        self._crew = Crew(identity, overlay, ticket, prompt, self, keep_s=KEEP_S if note else 0)
        self._crew.handovers += handovers
        if is_back and note is not None:
            self._crew.note = note
        self._mender = Mender(
            self._crew,
            self._answer,
            overlay,
            pace=pace,
            on_lost=on_lost,
            on_leaving=on_leaving,
            reserves=reserves,
            is_back=is_back,
        )

    @property
    def job_id(self) -> str:
        """How the client and the ledger know it."""
        return known_as(self.ticket.job_id)

    @property
    def ticket(self) -> JobTicket:
        """The one in force."""
        return self._crew.ticket

    @property
    def amendments(self) -> int:
        """How often its ring was changed."""
        return self._mender.amendments

    @property
    def is_turned_away(self) -> bool:
        """Whether a stage had no room for the job after all, or is about to leave."""
        cause = self._answer.loss and self._answer.loss.__cause__
        return isinstance(cause, RefusedError) and cause.code in ("no_capacity", LEAVING)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have the job run in all stages for as long as the context lasts."""
        async with trio.open_nursery() as nursery:
            if self._is_back:
                await self._crew.come_back(nursery)
            else:
                self._crew.attend(nursery)
            nursery.start_soon(self._mender.watch)
            nursery.start_soon(self._mender.mend, nursery)
            try:
                yield
            finally:
                try:
                    if not self._is_let_go:
                        with trio.CancelScope(shield=True):
                            await self.finish()
                    if not self._is_let_go:
                        self._crew.leave()
                finally:
                    self._crew.let_go()
                    nursery.cancel_scope.cancel()

    async def note_tickets(self) -> None:
        """Have it noted by what the job can be taken up, now and from now on."""
        if self._note is not None:
            self._crew.note = self._note
            await self._note(self.ticket, self._crew.handovers)

    def let_go(self) -> None:
        """Leave the job to its stages; see `Generation.let_go`."""
        self._is_let_go = True
        self._answer.is_ended = True
        self._crew.let_go()

    async def begins(self) -> bool:
        """Wait for the first token; False where a stage is lost before it comes."""
        return await self._answer.begins()

    def tokens(self) -> AsyncIterator[SampledToken]:
        """Token ids as they are sampled; see `Generation.tokens`."""
        return self._answer.read()

    async def finish(self) -> JobReport:
        """End the job in every stage, collect the receipts, and write down who did what. May be called again."""
        if self.report is None:
            tokens = tuple(self._answer.tokens)
            self._answer.is_ended = True
            self._crew.tell_news()
            if self._leads is not None and not await self._leads():
                self.let_go()  # another coordinator ends and settles it
                self.report = read_job(self.ticket, self._prompt, tokens, {}, self._crew.handovers)
                return self.report
            receipts = await self._crew.end(len(tokens), _RECEIPT_S)
            read = (self.ticket, self._prompt, tokens, receipts, self._crew.handovers)
            self.report = read_job(*read) if self.is_abandoned else await self._meter.settle(*read)
        return self.report

    def hear(self, stage: Attendance, message: Message) -> None:
        """Take a stage's message; see `Audience`."""
        if isinstance(message, Inherited):
            self._crew.tell_news()
        elif self._mender.is_left(stage):
            return
        elif isinstance(message, Token):
            self._take_token(stage, message.index, message.token, message.finish)
        elif isinstance(message, Failed):
            self._mender.take_failure(stage, message)
        elif isinstance(message, Paused):
            if stage.held is not None and max(stage.held.tokens, default=0) >= self._vocab_size:
                raise ProtocolError("it knows a token outside the vocabulary", code="bad_token")
            self._early.clear()  # it knows them
            self._crew.note_word(stage)
            self._crew.tell_news()
        elif isinstance(message, Leaving):
            self._mender.note_leaving(stage)
        elif isinstance(message, Ping):
            self._check_early(stage)
        elif not isinstance(message, Ready | Waiting):
            raise ProtocolError(f"it sent {type(message).__name__}", code="unexpected_message")

    def lose(self, stage: Attendance, error: AzuError) -> None:
        """The stage cannot go on; see `Audience`."""
        self._mender.lose(stage, error)

    def take(self, sender: str, epoch: int, index: int, token: int) -> None:
        """Take a token that the last stage sent beside its job stream. One of an earlier epoch is dropped: what that
        stage knew then, it says as it pauses.

        Raises:
            ProtocolError: the sender is not the last stage.
        """
        if epoch != self.ticket.epoch or not self._crew.stages:
            return
        stage = self._crew.stages[-1]
        if sender != stage.peer_id:
            raise ProtocolError(f"{sender} is not the last stage of this job", code="not_the_last_stage")
        if not self._mender.is_left(stage):
            try:
                self._take_token(stage, index, token)
            except ProtocolError as error:
                self.lose(stage, error)

    def _take_token(self, stage: Attendance, index: int, token: int, finish: str | None = None) -> None:
        answer = self._answer
        if answer.is_ended or answer.loss is not None:
            return
        is_last = stage.index == len(self.ticket.stages) - 1
        is_near = 0 <= index - len(answer.tokens) <= _MAX_EARLY
        if answer.is_complete or not is_last or not is_near or token >= self._vocab_size:
            raise ProtocolError("a token came out of turn", code="bad_token")
        if not self._early:
            self._early_since = trio.current_time()
        self._early[index] = token, finish
        while not self._answer.is_over and (found := self._early.pop(len(answer.tokens), None)) is not None:
            token, finish = found
            if finish not in (None, answer.finish(token)):
                raise ProtocolError("a token ends the answer where it should not, or does not", code="bad_token")
            self._mender.note_token()
            answer.add(token)

    def _check_early(self, stage: Attendance) -> None:
        is_late = self._early and trio.current_time() > self._early_since + _EARLY_S
        if is_late and stage.index == len(self.ticket.stages) - 1:
            raise ProtocolError("a token is missing", code="bad_token")
