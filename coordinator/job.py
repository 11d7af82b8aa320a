"""One running job as the coordinator sees it: a stream to each stage, token ids coming back, receipts at the end."""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from azu.channel import Channel, RefusedError
from azu.dialing import open_worker_stream
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import Overlay
from azu.tickets import JobTicket, Receipt, check_receipt, open_receipt, sign_ticket
from azu.wire.messages import (
    JOB,
    JOB_PROTOCOL,
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

# As in node/job.py: both ends of a job stream speak at least every PING_S and take SILENCE_S of silence for death.
_PING_S = 2.0
_SILENCE_S = 15.0
# Stages have this long to answer the end of a job with their receipt.
_RECEIPT_S = 5.0


class RunningJob:
    """A job in flight; implements `coordinator.generation.Generation`."""

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        ticket: JobTicket,
        prompt: tuple[int, ...],
        meter: Meter,
        *,
        on_lost: Callable[[str], None],
    ) -> None:
        self.ticket = ticket
        self._identity = identity
        self._overlay = overlay
        self._prompt = prompt
        self._meter = meter
        self._on_lost = on_lost
        self._channels: dict[int, Channel] = {}
        self._receipts: dict[int, tuple[bytes, Receipt]] = {}
        self._ended = trio.Event()
        self._attending = len(ticket.stages)
        self._all_done = trio.Event()
        self._emitted = 0
        self._is_lost = False
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
            try:
                yield
            finally:
                with trio.CancelScope(shield=True):
                    await self.finish()
                nursery.cancel_scope.cancel()

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
        peer_id = self.ticket.stages[index].peer_id
        try:
            async with await open_worker_stream(self._overlay, peer_id, JOB_PROTOCOL) as stream:
                channel = Channel(stream, JOB)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._speak, index, channel)
                    try:
                        await self._listen(index, channel)
                    except AzuError as error:  # kept out of the nursery, which would wrap it in a group
                        self._lose(index, error)
                    nursery.cancel_scope.cancel()
        except AzuError as error:
            self._lose(index, error)
        finally:
            self._attending -= 1
            if not self._attending:
                self._all_done.set()

    async def _speak(self, index: int, channel: Channel) -> None:
        try:
            await channel.send(Open(), sign_ticket(self._identity, self.ticket))
            if index == 0 or (index == len(self.ticket.stages) - 1 and self.ticket.sampling.repetition_penalty != 1.0):
                await channel.send(Prompt(), struct.pack(f"<{len(self._prompt)}I", *self._prompt))
            while not self._ended.is_set():
                with trio.move_on_after(_PING_S):
                    await self._ended.wait()
                await channel.send(End() if self._ended.is_set() else Ping())
        except NetworkError as error:
            log(logger, logging.DEBUG, "stage does not read", job=self.job_id, reason=error.message)

    async def _listen(self, index: int, channel: Channel) -> None:
        peer_id = channel.peer_id
        while True:
            with trio.move_on_after(_SILENCE_S) as silence:
                received = await channel.receive()
            if silence.cancelled_caught:
                raise NetworkError(f"silent for {_SILENCE_S:g} s")
            if received is None:
                raise NetworkError("it closed the stream")
            message, body = received
            if isinstance(message, ReceiptReply):
                self._take_receipt(index, bytes(body))
                return
            self._take(index, peer_id, message)

    def _take(self, index: int, peer_id: str, message: Message) -> None:
        if isinstance(message, Token):
            self._take_token(index, message)
        elif isinstance(message, Failed):
            blamed = self._stage_of(message.peer_id, index)
            self._lose(blamed, NetworkError(message.message, code=message.code))
        elif isinstance(message, Refused):
            raise RefusedError(peer_id, message)
        elif not isinstance(message, Ready | Ping):
            raise ProtocolError(f"it sent {type(message).__name__}", code="unexpected_message")

    def _take_token(self, index: int, token: Token) -> None:
        if self._ended.is_set():
            return
        finish = "stop" if token.token in self.ticket.stop_tokens else ""
        if not finish and self._emitted + 1 == self.ticket.max_tokens:
            finish = "length"
        if index != len(self.ticket.stages) - 1 or (token.index, token.finish) != (self._emitted, finish):
            raise ProtocolError("a token came out of turn", code="bad_token")
        self._emitted += 1
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

    def _lose(self, index: int, error: AzuError) -> None:
        """Note that a stage cannot go on. The first such error ends the token stream; the rest is logged."""
        stage = self.ticket.stages[index]
        if self._ended.is_set() or self._is_lost:
            log(logger, logging.DEBUG, "stage ended", job=self.job_id, peer=stage.peer_id, reason=error.message)
            return
        self._is_lost = True
        log(logger, logging.WARNING, "stage lost", job=self.job_id, peer=stage.peer_id, reason=error.message)
        self._on_lost(stage.peer_id)
        self._events_in.send_nowait(
            NetworkError(
                f"the worker {stage.peer_id} with layers {stage.start}-{stage.end - 1} failed: {error.message}",
                code="stage_lost",
                remedy="Send the request again; another worker takes its place where there is one",
            )
        )
