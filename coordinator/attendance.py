"""The coordinator's end of one stage's job stream, from the ticket to the receipt."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import trio

from azu.channel import Channel, RefusedError
from azu.dialing import open_worker_stream
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.logs import log
from azu.overlay import Overlay
from azu.tickets import JobTicket, Receipt, check_receipt, open_receipt
from azu.wire.messages import (
    JOB,
    JOB_PROTOCOL,
    PING_S,
    SILENCE_S,
    Amend,
    Bequeath,
    End,
    Forget,
    Inherited,
    Leaving,
    Message,
    Open,
    Paused,
    Ping,
    Prompt,
    Ready,
    ReceiptReply,
    Refused,
    Resume,
    Waiting,
)
from azu.wire.tokens import pack_tokens, unpack_tokens
from coordinator.agreement import Word
from coordinator.mending import Held, Start

__all__ = ["Attendance", "Audience"]

logger = logging.getLogger(__name__)

# Messages that may wait to be written to one stage: an amendment and a resumption each for some epochs.
_MAX_ORDERS = 32
# What a stage's word that it waits is good for: it comes twice in that time. And how often it is taken, 20 minutes in
# all: a stage may lie.
_WAITING_S = 20.0
_MAX_WAITS = 120
_GOOD_BYE_S = 1.0


class Audience(Protocol):
    """The job that a stage is attended for."""

    def hear(self, stage: Attendance, message: Message) -> None:
        """Take a message of the stage's; raises AzuError where it may not say that."""

    def lose(self, stage: Attendance, error: AzuError) -> None:
        """The stage cannot go on."""


class Attendance:
    """One stage of a job at one peer.

    Args:
        envelope: the ticket, signed.
        prompt: where this stage has to know it.
        keep_s: how long it is to keep the job while this coordinator is away.
        is_kept: it keeps the job, whose coordinator has come back, and knows all but the amendment that comes next.

    Attributes:
        ticket: the last that it was sent.
        is_up: whether it has taken the job up.
        is_leaving: whether its worker has said that it is about to leave.
        waits_until: when it may be thought to hang that has said that the job waits for KV cache, in trio's time.
        held: what it holds, since it is paused for that ticket.
        word: what it says of the epoch that ended then.
        inherited: positions whose KV cache it has from the stage's former worker, once that is known.
        is_gone: whether it is attended no more.
        receipt: its envelope and content, once it has come.
    """

    def __init__(
        self,
        overlay: Overlay,
        ticket: JobTicket,
        index: int,
        envelope: bytes,
        prompt: Sequence[int] | None,
        *,
        keep_s: int = 0,
        is_kept: bool = False,
    ) -> None:
        self.ticket = ticket
        self.index = index
        self.peer_id = ticket.stages[index].peer_id
        self.is_up = False
        self.is_leaving = False
        self.held: Held | None = None
        self.word: Word | None = None
        self.inherited: int | None = None
        self.is_gone = False
        self.waits_until = 0.0
        self.receipt: tuple[bytes, Receipt] | None = None
        self._overlay = overlay
        # Shielded: when a client hangs up, the stages shall hear the end and answer it with their receipts.
        self._scope = trio.CancelScope(shield=True)
        self._orders: deque[tuple[Message, bytes]] = deque()
        if not is_kept:
            self._orders.append((Open(keep_s=keep_s), envelope))
            if prompt is not None:
                self._orders.append((Prompt(), pack_tokens(prompt)))
        self._ordered = trio.Event()
        self._is_ended = False
        self._is_left = False
        self._has_run = is_kept or ticket.epoch == 0
        self._waits = 0
        self._counted = 0

    async def run(self, audience: Audience) -> None:
        """Attend the stage until it has given its receipt, or is lost, or is left."""
        try:
            with self._scope:
                async with await open_worker_stream(self._overlay, self.peer_id, JOB_PROTOCOL) as stream:
                    channel = Channel(stream, JOB)
                    try:
                        await self._converse(channel, audience)
                    finally:
                        if self._is_left:
                            await self._say_good_bye(channel)
        except AzuError as error:
            audience.lose(self, error)
        finally:
            self.is_gone = True

    def amend(self, ticket: JobTicket, envelope: bytes, known: int) -> None:
        """Pause the stage, to go on by this ticket. known: tokens that have come."""
        self.ticket, self.held, self.word = ticket, None, None
        self.index = next(n for n, stage in enumerate(ticket.stages) if stage.peer_id == self.peer_id)
        self._order(Amend(known=known), envelope)

    def bequeath(self, envelope: bytes, positions: int) -> None:
        """Have the stage send its KV cache of so many positions to its heir in this ticket."""
        self._order(Bequeath(positions=positions), envelope)

    def resume(self, start: Start, known: Sequence[int]) -> None:
        """Let the stage go on after these sampled tokens."""
        body = pack_tokens(known) if self.index in (0, len(self.ticket.stages) - 1) else b""
        epoch, count = self.ticket.epoch, len(known)
        self._has_run = True
        self._order(Resume(epoch=epoch, position=start.position, send_from=start.send_from, known=count), body)

    def end(self, tokens: int) -> None:
        """End the job in this stage, which answers with its receipt for so many tokens."""
        self._is_ended, self._counted = True, tokens
        self._ordered.set()

    def leave(self) -> None:
        """Attend it no more: the job goes on without it."""
        self._is_left = True
        self._scope.cancel()

    def let_go(self) -> None:
        """Attend it no more, and leave it the job, which it keeps for a while."""
        self._scope.cancel()

    def _order(self, message: Message, body: bytes) -> None:
        if len(self._orders) >= _MAX_ORDERS:
            return  # it does not read: it will be missed
        self._orders.append((message, body))
        self._ordered.set()

    async def _say_good_bye(self, channel: Channel) -> None:
        with trio.move_on_after(_GOOD_BYE_S, shield=True):
            try:
                await channel.send(Forget())
            except NetworkError as error:
                log(logger, logging.DEBUG, "stage does not read", peer=self.peer_id, reason=error.message)

    async def _converse(self, channel: Channel, audience: Audience) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak, channel)
            try:
                await self._listen(channel, audience)
            except AzuError as error:  # kept out of the nursery, which would wrap it in a group
                audience.lose(self, error)
            nursery.cancel_scope.cancel()

    async def _speak(self, channel: Channel) -> None:
        try:
            while True:
                while self._orders:
                    await channel.send(*self._orders.popleft())
                if self._is_ended:
                    return await channel.send(End(tokens=self._counted))
                self._ordered = trio.Event()
                with trio.move_on_after(PING_S) as pause:
                    await self._ordered.wait()
                if pause.cancelled_caught:
                    await channel.send(Ping())
        except NetworkError as error:
            log(logger, logging.DEBUG, "stage does not read", peer=self.peer_id, reason=error.message)

    async def _listen(self, channel: Channel, audience: Audience) -> None:
        while True:
            with trio.move_on_after(SILENCE_S) as silence:
                received = await channel.receive()
            if silence.cancelled_caught:
                raise NetworkError(f"silent for {SILENCE_S:g} s")
            if received is None:
                raise NetworkError("it closed the stream")
            message, body = received
            if isinstance(message, ReceiptReply) and self._is_ended:
                self._take_receipt(bytes(body))
                return
            if isinstance(message, Refused):
                raise RefusedError(self.peer_id, message)
            if isinstance(message, Paused):
                self._take_paused(message, body)
            if isinstance(message, Waiting):
                self._note_waiting()
            if isinstance(message, Inherited):
                self._take_inherited(message)
            if isinstance(message, Leaving):
                if self.is_leaving:
                    continue  # the job looks for other workers each time that it is told
                self.is_leaving = True
            self.is_up = self.is_up or isinstance(message, Ready | Paused)
            audience.hear(self, message)

    def _take_inherited(self, message: Inherited) -> None:
        if self.inherited is not None:
            raise ProtocolError("it inherited the stage before", code="unexpected_message")
        self.inherited = message.positions

    def _note_waiting(self) -> None:
        self._waits += 1
        if self._waits <= _MAX_WAITS:
            self.waits_until = trio.current_time() + _WAITING_S

    def _take_paused(self, message: Paused, body: bytearray) -> None:
        if message.epoch < self.ticket.epoch:
            return  # a newer amendment is under way to it
        if message.epoch > self.ticket.epoch or self.held is not None or self.ticket.epoch == 0:
            raise ProtocolError("it paused when it was not asked to", code="unexpected_message")
        tokens = unpack_tokens(body)
        if len(tokens) > self.ticket.max_tokens or message.position > self.ticket.total_tokens:
            raise ProtocolError("it holds what it cannot hold", code="bad_paused")
        self.held = Held(
            message.position, message.can_replay, tokens, is_new=not self._has_run, replay_from=message.replay_from
        )
        self.word = Word(message.position, message.received, message.sent)

    def _take_receipt(self, envelope: bytes) -> None:
        signer, receipt = open_receipt(envelope)
        refusal = check_receipt(receipt, signer=signer, ticket=self.ticket, stage=self.index)
        if refusal is not None:
            job = self.ticket.job_id.hex()
            log(logger, logging.WARNING, "receipt refused", job=job, peer=self.peer_id, reason=refusal.message)
            raise ProtocolError(refusal.message, code=refusal.code)
        self.receipt = (envelope, receipt)
