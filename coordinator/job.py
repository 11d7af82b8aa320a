"""One running job as the coordinator sees it: a stream to each stage, token ids coming back, receipts at the end."""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from azu.channel import Channel, RefusedError
from azu.dialing import open_worker_stream
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import Overlay
from azu.tickets import JobTicket, Receipt, check_receipt, open_receipt, sign_ticket
from azu.wire.messages import (
    JOB,
    JOB_PROTOCOL,
    PING_S,
    SILENCE_S,
    End,
    Failed,
    Message,
    Open,
    Ping,
    Prompt,
    Ready,
    ReceiptReply,
    Refused,
    Token,
)
from coordinator.generation import JobReport, SampledToken
from coordinator.meter import Meter

__all__ = ["RunningJob"]

logger = logging.getLogger(__name__)

# Stages have this long to answer the end of a job with their receipt.
_RECEIPT_S = 5.0
# A job in which no token comes for this long, and so many times what the workers' own measurements promise, is given
# up: its stages may say that they live for as long as they like.
_STALL_S = 60.0
_STALL_SLACK = 10.0
# How much a fault weighs against the peer that seems to be at fault, and against one that may be: its accuser, who may
# lie, and everybody in a job that stalls.
_AT_FAULT, _SUSPECT = 2, 1


class RunningJob:
    """A job in flight; implements `coordinator.generation.Generation`.

    Args:
        pace: seconds that a position takes through all stages, as their workers measured.
        on_lost: told a peer id, the weight of its fault and the error, as soon as a stage is lost.
    """

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        ticket: JobTicket,
        prompt: tuple[int, ...],
        meter: Meter,
        *,
        pace: float,
        on_lost: Callable[[str, int, AzuError], None],
    ) -> None:
        self.ticket = ticket
        self._identity = identity
        self._overlay = overlay
        self._prompt = prompt
        self._meter = meter
        self._pace = pace
        self._on_lost = on_lost
        self._receipts: dict[int, tuple[bytes, Receipt]] = {}
        self._ended = trio.Event()
        # Shielded: when a client hangs up, the stages shall hear the end and answer it with their receipts.
        self._attendances = tuple(trio.CancelScope(shield=True) for _ in ticket.stages)
        self._attending = len(ticket.stages)
        self._all_done = trio.Event()
        self._emitted = 0
        self._moved_at = trio.current_time()
        self._begun = trio.Event()
        self._is_complete = False
        self.loss: AzuError | None = None
        self._report: JobReport | None = None
        # Bounded by the ticket: at most max_tokens tokens and one error are ever put in.
        self._events_in, self._events = trio.open_memory_channel[SampledToken | AzuError](ticket.max_tokens + 1)

    @property
    def job_id(self) -> str:
        """The job's id in hex."""
        return self.ticket.job_id.hex()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have the job run in all stages for as long as the context lasts."""
        async with trio.open_nursery() as nursery:
            for index in range(len(self.ticket.stages)):
                nursery.start_soon(self._attend, index)
            nursery.start_soon(self._watch)
            try:
                yield
            finally:
                try:
                    with trio.CancelScope(shield=True):
                        await self.finish()
                finally:
                    nursery.cancel_scope.cancel()
                    for scope in self._attendances:
                        scope.cancel()

    async def begins(self) -> bool:
        """Wait for the first token; False where a stage is lost before it comes, see `loss`."""
        await self._begun.wait()
        return self._emitted > 0

    async def tokens(self) -> AsyncIterator[SampledToken]:
        """Token ids as they are sampled; see `Generation.tokens`."""
        async for event in self._events:
            if isinstance(event, AzuError):
                raise event
            yield event
            if event.finish:
                return

    async def finish(self) -> JobReport:
        """End the job in every stage, collect the receipts, and write down who did what. May be called again."""
        if self._report is None:
            emitted = self._emitted
            self._ended.set()
            with trio.move_on_after(_RECEIPT_S):
                await self._all_done.wait()
            self._report = await self._meter.settle(self.ticket, emitted, self._receipts)
        return self._report

    async def _attend(self, index: int) -> None:
        """One stage, from its ticket to its receipt."""
        try:
            with self._attendances[index]:
                stream = await open_worker_stream(self._overlay, self.ticket.stages[index].peer_id, JOB_PROTOCOL)
                async with stream:
                    await self._converse(index, Channel(stream, JOB))
        except AzuError as error:
            self._lose(index, error)
        finally:
            self._attending -= 1
            if not self._attending:
                self._all_done.set()

    async def _converse(self, index: int, channel: Channel) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak, index, channel)
            try:
                await self._listen(index, channel)
            except AzuError as error:  # kept out of the nursery, which would wrap it in a group
                self._lose(index, error)
            nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Give the job up where its tokens stop coming."""
        while True:
            await trio.sleep(1)
            positions = 1 if self._emitted else self.ticket.prompt_tokens
            patience = _STALL_S + _STALL_SLACK * self._pace * positions
            if self._is_complete or self.loss is not None or self._ended.is_set():
                return
            if trio.current_time() > self._moved_at + patience:
                error = NetworkError(
                    f"no token came for {patience:.0f} s", code="job_stalled", remedy="Send the request again"
                )
                for stage in self.ticket.stages:
                    self._on_lost(stage.peer_id, _SUSPECT, error)
                self._give_up(error)
                return

    async def _speak(self, index: int, channel: Channel) -> None:
        try:
            await channel.send(Open(), sign_ticket(self._identity, self.ticket))
            if index == 0 or (index == len(self.ticket.stages) - 1 and self.ticket.sampling.repetition_penalty != 1.0):
                await channel.send(Prompt(), struct.pack(f"<{len(self._prompt)}I", *self._prompt))
            while True:
                with trio.move_on_after(PING_S):
                    await self._ended.wait()
                if self._ended.is_set():
                    return await channel.send(End())
                await channel.send(Ping())
        except NetworkError as error:
            log(logger, logging.DEBUG, "stage does not read", job=self.job_id, reason=error.message)

    async def _listen(self, index: int, channel: Channel) -> None:
        peer_id = channel.peer_id
        while True:
            with trio.move_on_after(SILENCE_S) as silence:
                received = await channel.receive()
            if silence.cancelled_caught:
                raise NetworkError(f"silent for {SILENCE_S:g} s")
            if received is None:
                raise NetworkError("it closed the stream")
            message, body = received
            if isinstance(message, ReceiptReply) and self._ended.is_set():
                self._take_receipt(index, bytes(body))
                return
            self._take(index, peer_id, message)

    def _take(self, index: int, peer_id: str, message: Message) -> None:
        if isinstance(message, Token):
            self._take_token(index, message)
        elif isinstance(message, Failed):
            blamed = self._stage_of(message.peer_id, index)
            error = NetworkError(message.message, code=message.code)
            if blamed != index and not self._is_over:
                self._on_lost(peer_id, _SUSPECT, error)
            self._lose(blamed, error)
        elif isinstance(message, Refused):
            raise RefusedError(peer_id, message)
        elif not isinstance(message, Ready | Ping):
            raise ProtocolError(f"it sent {type(message).__name__}", code="unexpected_message")

    def _take_token(self, index: int, token: Token) -> None:
        if self._ended.is_set() or self.loss is not None:
            return
        finish = "stop" if token.token in self.ticket.stop_tokens else ""
        if not finish and self._emitted + 1 == self.ticket.max_tokens:
            finish = "length"
        is_last = index == len(self.ticket.stages) - 1
        if self._is_complete or not is_last or (token.index, token.finish) != (self._emitted, finish):
            raise ProtocolError("a token came out of turn", code="bad_token")
        self._emitted += 1
        self._is_complete = bool(finish)
        self._moved_at = trio.current_time()
        self._begun.set()
        self._events_in.send_nowait(SampledToken(token.token, token.finish))

    def _take_receipt(self, index: int, envelope: bytes) -> None:
        signer, receipt = open_receipt(envelope)
        if (refusal := check_receipt(receipt, signer=signer, ticket=self.ticket, stage=index)) is not None:
            raise ProtocolError(refusal.message, code=refusal.code)
        self._receipts[index] = (envelope, receipt)

    def _stage_of(self, peer_id: str, fallback: int) -> int:
        """The stage that a peer blames; itself if it names a stranger."""
        index = self.ticket.stage_of(peer_id)
        return fallback if index is None else index

    @property
    def is_turned_away(self) -> bool:
        """Whether a stage had no room for the job after all."""
        cause = self.loss and self.loss.__cause__
        return isinstance(cause, RefusedError) and cause.code == "no_capacity"

    @property
    def _is_over(self) -> bool:
        """Whether nothing that goes wrong from now on matters to the client."""
        return self._ended.is_set() or self._is_complete or self.loss is not None

    def _lose(self, index: int, error: AzuError) -> None:
        """Note that a stage cannot go on. The first such error ends the token stream; the rest is logged."""
        stage = self.ticket.stages[index]
        if isinstance(error, ProtocolError | TrustError):
            self._overlay.count_violation(stage.peer_id)
        if self._is_over:
            log(logger, logging.DEBUG, "stage ended", job=self.job_id, peer=stage.peer_id, reason=error.message)
            return
        log(logger, logging.WARNING, "stage lost", job=self.job_id, peer=stage.peer_id, reason=error.message)
        self._on_lost(stage.peer_id, _AT_FAULT, error)
        lost = NetworkError(
            f"the worker {stage.peer_id} with layers {stage.start}-{stage.end - 1} failed: {error.message}",
            code="stage_lost",
            remedy="Send the request again; another worker takes its place where there is one",
        )
        lost.__cause__ = error
        self._give_up(lost)

    def _give_up(self, error: AzuError) -> None:
        self.loss = error
        self._begun.set()
        self._events_in.send_nowait(error)
