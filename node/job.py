"""One job in one stage: from an accepted ticket to a signed receipt.

    coordinator ──job stream──► listen     prompt, amendments, pings, the end
    leg after leg ────────────► compute    `node/leg.py`

The coordinator decides when a job ends. What breaks first in a leg is reported to it as `Failed`, naming the peer whose
fault it seems, and the stage then waits for its verdict: the end, or an amendment, after which another leg begins with
other neighbours. What the stage holds of the job is kept from leg to leg. It is kept for a while, too, where the
coordinator goes away: the leg is paused, and the coordinator may come back on another stream, with an amendment.
Leaving `run()` frees it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from azu.amendments import check_amendment, check_bequest
from azu.channel import Channel
from azu.crossings import NOTHING, Crossing, token_crossing
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.logs import log
from azu.tickets import JobTicket, Receipt, Refusal, open_ticket
from azu.wire.messages import (
    PING_S,
    Amend,
    Bequeath,
    End,
    Forget,
    Hello,
    Inherited,
    Leaving,
    Message,
    Paused,
    Ping,
    Prompt,
    Resume,
    Waiting,
)
from azu.wire.tensors import ITEMSIZE
from azu.wire.tokens import pack_tokens
from node.heritage import bequeath, inherit
from node.history import History, HistoryBudget
from node.leg import Leg, Surroundings
from node.line import Line
from node.packs import Entry
from node.progress import Progress
from node.session import StageSession

__all__ = ["StageJob"]

logger = logging.getLogger(__name__)


class StageJob:
    """Stage `index` of a ticket's job on this worker; in later tickets of the job it may have another index.

    Args:
        envelope: the ticket, signed.
        is_trusted: whether this worker serves a coordinator.
        on_leg: called when another leg begins.

    Attributes:
        ticket, envelope: those in force.
        counted: the tokens that the coordinator had when it ended the job; None where it has not.
    """

    def __init__(
        self,
        ticket: JobTicket,
        index: int,
        around: Surroundings,
        *,
        envelope: bytes,
        history: HistoryBudget,
        is_trusted: Callable[[str], bool],
        on_leg: Callable[[], None],
    ) -> None:
        self.ticket, self.envelope = ticket, envelope
        self.index = index
        self._around = around
        self._is_trusted = is_trusted
        self._on_leg = on_leg
        self._amended = trio.Event()  # set with an amendment, and then replaced
        stage = around.stage
        self._session = StageSession(ticket, index, hidden_size=stage.hidden_size, vocab_size=stage.vocab_size)
        self._progress = Progress(History(history, stage.hidden_size * ITEMSIZE[self._session.dtype]))
        self._leg = Leg(ticket, index, around, self._progress)
        self._known = 0  # tokens that the coordinator has, as it last said
        self._left = trio.Event()
        # One that is being sent, and one that waits.
        self._bequests_in, self._bequests = trio.open_memory_channel[tuple[JobTicket, int]](1)
        self._inheriting: trio.CancelScope | None = None
        self.counted: int | None = None
        self.expiry = trio.CancelScope()
        self._set_expiry()

    @property
    def position(self) -> int:
        """Positions in its KV cache."""
        return self._progress.positions

    @property
    def line(self) -> Line:
        """To the coordinator."""
        return self._around.coordinator

    @property
    def epoch(self) -> int:
        """That of the leg which runs."""
        return self._leg.ticket.epoch

    async def run(self) -> None:
        """Serve the job until the coordinator ends it, or until `expiry`.

        Raises:
            NetworkError: the coordinator went away, or goes on without this stage.
            ProtocolError: it broke the protocol.
        """
        lost: AzuError | None = None
        try:
            with self.expiry:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat)
                    nursery.start_soon(self._tell_leaving)
                    nursery.start_soon(self._send_bequests)
                    nursery.start_soon(self._run_legs)
                    try:
                        await self._listen()
                    except AzuError as error:  # carried past the nursery, which would wrap it in a group
                        lost = error
                    nursery.cancel_scope.cancel()
        finally:
            if self._inheriting is not None:
                self._inheriting.cancel()
            self._progress.history.clear()
            self._progress.state = None
        if lost is not None:
            raise lost

    def leave(self) -> None:
        """Tell the coordinator that others have to take the job over; it runs until it is ended."""
        self._left.set()

    async def receive_from(self, channel: Channel, hello: Hello) -> None:
        """Take what the previous stage sends on a ring stream of the leg that runs, as `Leg.receive_from`; or the KV
        cache, from who leaves this stage.
        """
        if hello.stage == self._leg.index:
            await self._inherit(channel, hello)
        else:
            await self._leg.receive_from(channel, hello)

    @property
    def previous(self) -> str:
        """The peer id of the stage before this one."""
        return self._leg.previous

    def take(self, entry: Entry) -> None:
        """As `Leg.take`, in the leg that runs."""
        self._leg.take(entry)

    async def fail(self, error: ProtocolError) -> None:
        """Tell the coordinator that the previous stage broke the protocol."""
        await self._leg.fail(error, self.previous)

    async def _inherit(self, channel: Channel, hello: Hello) -> None:
        entry, around, job_id = self.ticket.stages[self.index], self._around, self.ticket.job_id
        if channel.peer_id != entry.heir_of or hello.part or self._inheriting is not None:
            raise ProtocolError(f"{channel.peer_id} does not leave this stage to this worker", code="not_a_neighbour")
        part, tokens = (entry.start, entry.end), self.ticket.total_tokens
        opening = partial(around.stage.open_job, self.ticket.sampling, (), tokens, (), part)
        positions = 0
        try:
            with trio.CancelScope() as self._inheriting:
                grow = partial(around.kv.grow, job_id, tell=self._tell_waiting)
                state = await inherit(channel, around.device, opening, grow, tokens - 1)
                if self.ticket.epoch == hello.epoch:  # else an amendment has come, which does not count with it
                    self._progress.inherit(state)
                    positions = state.position
        finally:
            with trio.move_on_after(1, shield=True):
                await self.line.send(Inherited(positions=positions))

    async def _tell_waiting(self) -> None:
        await self.line.send(Waiting())

    async def _send_bequests(self) -> None:
        around = self._around
        async for ticket, positions in self._bequests:
            state = self._progress.state
            if state is None or positions > self._progress.positions:  # it has begun afresh
                continue
            try:
                await bequeath(around.overlay, around.device, state, positions, ticket)
            except AzuError as error:
                job = ticket.job_id.hex()
                log(logger, logging.INFO, "KV cache not handed over", job=job, reason=str(error))

    async def _run_legs(self) -> None:
        if self.ticket.epoch:
            await self._tell_paused(NOTHING, NOTHING)
        while True:
            await self._leg.run()
            while self.epoch == self.ticket.epoch:  # it was paused since the coordinator is away
                await self._amended.wait()
            seams = self._crossings(self._leg, self._known)
            self._leg = Leg(self.ticket, self.index, self._around, self._progress)
            self._on_leg()
            await self._tell_paused(*seams)

    async def _tell_paused(self, received: Crossing, sent: Crossing) -> None:
        progress = self._progress
        paused = Paused(
            epoch=self.epoch,
            position=progress.positions,
            can_replay=progress.history.is_whole,
            replay_from=progress.history.start,
            received=received,
            sent=sent,
        )
        await self.line.send(paused, pack_tokens(progress.tokens[self._known :]))

    async def _tell_leaving(self) -> None:
        await self._left.wait()
        while True:  # one that comes back has forgotten it
            await self.line.send(Leaving())
            await self.line.changed()

    async def _listen(self) -> None:
        """Take the coordinator's messages until it ends the job."""
        job = self.ticket.job_id.hex()
        while True:
            received = await self.line.receive()
            if received is None:
                log(logger, logging.INFO, "coordinator is away", job=job)
                self._leg.pause()
                await self.line.until_back()
                log(logger, logging.INFO, "coordinator is back", job=job)
                continue
            message, body = received
            if isinstance(message, End):
                self.counted = message.tokens
                return
            if isinstance(message, Forget):
                raise NetworkError("the job goes on without this stage", code="stage_left")
            self._take(message, body)

    def _take(self, message: Message, body: bytearray) -> None:
        if isinstance(message, Prompt):
            self._take_prompt(body)
        elif isinstance(message, Amend):
            self._amend(message, bytes(body))
        elif isinstance(message, Bequeath):
            self._take_bequest(message.positions, bytes(body))
        elif isinstance(message, Resume):
            if message.epoch > self.epoch:
                raise ProtocolError("a job is to go on that was not paused", code="unexpected_message")
            if message.epoch == self.ticket.epoch:  # else a newer amendment is in force
                self._leg.resume(message, body)
        elif not isinstance(message, Ping):
            raise ProtocolError(f"{type(message).__name__} on a running job", code="unexpected_message")

    def _take_prompt(self, body: bytearray) -> None:
        if self._progress.prompt_came.is_set():
            raise ProtocolError("a second prompt for one job", code="bad_prompt")
        self._progress.prompt = self._session.accept_prompt(body)
        self._progress.prompt_came.set()

    def take_up(self, channel: Channel, message: Amend, envelope: bytes) -> Refusal | None:
        """Go on with a coordinator that has come back on another stream, or with one that follows it, if the amendment
        that it begins with holds.

        Raises:
            TrustError, ProtocolError: it is no signed ticket.
        """
        refusal = self._check(envelope, sender=channel.peer_id)
        if refusal is None:
            self.line.move(channel)
            self._go_by(envelope, message.known)
        return refusal

    def _amend(self, message: Amend, envelope: bytes) -> None:
        refusal = self._check(envelope, sender=self.ticket.coordinator)
        if refusal is not None:
            raise ProtocolError(refusal.message, code=refusal.code)
        self._go_by(envelope, message.known)

    def _go_by(self, envelope: bytes, known: int) -> None:
        _, ticket = open_ticket(envelope)
        log(logger, logging.INFO, "job amended", job=ticket.job_id.hex(), epoch=ticket.epoch)
        self.ticket, self.envelope, self._known = ticket, envelope, known
        self.index = ticket.stage_of(self._around.identity.peer_id) or 0
        if self._inheriting is not None:
            self._inheriting.cancel()
        self._set_expiry()
        self._leg.pause()
        self._amended.set()
        self._amended = trio.Event()

    def _check(self, envelope: bytes, *, sender: str) -> Refusal | None:
        signer, ticket = open_ticket(envelope)
        if sender != signer:
            return Refusal("wrong_signer", "the amendment was not sent by the job's coordinator")
        me, is_trusted = self._around.identity.peer_id, self._is_trusted
        return check_amendment(ticket, self.ticket, signer=signer, me=me, now=time.time(), is_trusted=is_trusted)

    def _take_bequest(self, positions: int, envelope: bytes) -> None:
        signer, ticket = open_ticket(envelope)
        refusal = check_bequest(ticket, self.ticket, signer=signer, me=self._around.identity.peer_id, now=time.time())
        if refusal is not None:
            raise ProtocolError(refusal.message, code=refusal.code)
        with suppress(trio.WouldBlock):  # the coordinator has given up the one that waits, too
            self._bequests_in.send_nowait((ticket, positions))

    def _set_expiry(self) -> None:
        self.expiry.deadline = trio.current_time() + max(0.0, self.ticket.expires_at - time.time())

    async def _beat(self) -> None:
        while True:
            await trio.sleep(PING_S)
            await self.line.send(Ping())

    def receipt(self) -> Receipt:
        """What this stage did, by itself and with its neighbours."""
        entry = self.ticket.stages[self.index]
        is_begun = self._leg.ticket.epoch == self.ticket.epoch  # else nothing has gone to or from the new neighbours
        received, sent = self._crossings(self._leg if is_begun else None, self.counted or 0)
        return Receipt(
            job_id=self.ticket.job_id,
            epoch=self.ticket.epoch,
            stage=self.index,
            peer_id=entry.peer_id,
            start=entry.start,
            end=entry.end,
            tokens=self._progress.positions,
            received=received,
            sent=sent,
            issued_at=int(time.time()),
        )

    def _crossings(self, leg: Leg | None, counted: int) -> tuple[Crossing, Crossing]:
        """What was received and sent in a leg for the tokens that the coordinator counts."""
        progress, prompt, positions = self._progress, self.ticket.prompt_tokens, self.ticket.positions(counted)
        received = leg.received.until(positions) if leg is not None else NOTHING
        sent = leg.sent.until(positions) if leg is not None else NOTHING
        if self._session.is_first:
            received = token_crossing(0, [*progress.prompt, *progress.tokens][:positions])
        if self._session.is_last:
            sent = token_crossing(prompt, progress.tokens[:counted])
        return received, sent
