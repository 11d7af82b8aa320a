"""One job in one stage: from an accepted ticket to a signed receipt.

    coordinator ──job stream──► listen     prompt, pings, the end
    previous ────ring streams─► receive    chunks (in the first stage: sampled tokens), checked, into a bounded inbox
    inbox ────────────────────► compute    one step at a time on the device thread, results passed on
    next ◄───────ring streams── link       what was computed; credit comes back

The coordinator decides when a job ends. What breaks first is reported to it as `Failed`, naming the peer whose fault it
seems, and the stage then waits for its verdict. Leaving `run()` frees the KV cache.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from azu.channel import Channel
from azu.errors import AzuError, InternalError, NetworkError, ProtocolError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import Overlay
from azu.tickets import JobTicket, Receipt, sign_receipt
from azu.wire.frames import Buffer
from azu.wire.messages import (
    PING_S,
    SILENCE_S,
    Chunk,
    Credit,
    End,
    Failed,
    Hello,
    Message,
    Moved,
    Next,
    Ping,
    Prompt,
    Ready,
    Token,
)
from node.engine.device import DeviceThread
from node.engine.stage import JobState, LoadedStage, Output, Step
from node.instruments import RingMeter
from node.intake import Intake, Part
from node.ring import GRANT, WINDOW, RingLink
from node.session import StageSession

__all__ = ["StageJob"]

logger = logging.getLogger(__name__)

# A checked message of the ring, its body and its rows.
Work = tuple[Chunk | Next, bytearray, int]


class StageJob:
    """Stage `index` of a ticket's job on this worker."""

    def __init__(
        self,
        ticket: JobTicket,
        index: int,
        *,
        identity: Identity,
        overlay: Overlay,
        device: DeviceThread,
        stage: LoadedStage,
        coordinator: Channel,
        meter: RingMeter,
    ) -> None:
        self.ticket = ticket
        self.index = index
        self._identity = identity
        self._overlay = overlay
        self._device = device
        self._stage = stage
        self._coordinator = coordinator
        self._meter = meter
        self._session = StageSession(ticket, index, hidden_size=stage.hidden_size, vocab_size=stage.vocab_size)
        self._state: JobState | None = None
        self._prompt: tuple[int, ...] = ()
        self._prompt_came = trio.Event()
        self._inbox_in, self._inbox = trio.open_memory_channel[Work](WINDOW)
        self._has_failed = False
        self._taken = 0
        self._tokens = 0
        self._first_input = hashlib.sha256()
        self._last_output: Buffer = b""
        hello = Hello(job_id=ticket.job_id, epoch=ticket.epoch, stage=index)
        count = len(ticket.stages)
        next_peer = ticket.stages[(index + 1) % count].peer_id
        self._link = RingLink(overlay, next_peer, hello, meter) if count > 1 else None
        theirs = hello.model_copy(update={"stage": (index - 1) % count})
        self._intake = Intake(theirs, ticket.stages[index - 1].peer_id, self._session.max_body)

    @property
    def position(self) -> int:
        """Positions in its KV cache."""
        return self._state.position if self._state is not None else 0

    async def run(self) -> None:
        """Serve the job until the coordinator ends it.

        Raises:
            NetworkError: the coordinator went away. ProtocolError: it broke the protocol.
        """
        lost: AzuError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat)
                nursery.start_soon(self._guard, self._compute, self._identity.peer_id)
                if self._link is not None:
                    nursery.start_soon(self._guard, partial(self._link.run, self._ready), self._link.peer_id)
                try:
                    if self._link is None:
                        await self._ready()
                    await self._listen()
                except AzuError as error:  # carried past the nursery, which would wrap it in a group
                    lost = error
                nursery.cancel_scope.cancel()
        finally:
            self._intake.close()
            self._device.ended(id(self._state))
            self._state = None
        if lost is not None:
            raise lost

    async def _ready(self) -> None:
        await self._coordinator.send(Ready())

    async def receive_from(self, channel: Channel, hello: Hello) -> None:
        """Take what the previous stage sends on a ring stream, until the job ends or the ring moves to another one.

        Raises:
            NetworkError: the stream broke.
            ProtocolError: the stream is not from this job's previous stage, or breaks the protocol.
        """
        part = self._intake.admit(channel, hello)
        with part.scope:
            await part.its_turn()
            try:
                await self._receive(part)
            except AzuError as error:
                await self._fail(error, channel.peer_id)
                raise

    async def _receive(self, part: Part) -> None:
        channel = part.channel
        while (received := await channel.receive()) is not None:
            message, body = received
            if isinstance(message, Moved):
                await self._intake.follow(message)
                return
            try:
                self._inbox_in.send_nowait(self._accept(message, body))
            except trio.WouldBlock:
                raise ProtocolError(f"{channel.peer_id} sent more than it has credit for", code="no_credit") from None
        raise NetworkError(f"{channel.peer_id} closed the ring", code="stage_lost")

    def _accept(self, message: Message, body: bytearray) -> Work:
        """Check a message as it comes: what is wrong with it is its sender's fault, and nobody else's."""
        if isinstance(message, Next):
            self._session.accept_next(message)
            return message, body, 1
        if isinstance(message, Chunk):
            return message, body, self._session.accept_chunk(message, len(body))
        raise ProtocolError(f"{type(message).__name__} on the ring", code="unexpected_message")

    async def _listen(self) -> None:
        """Take the coordinator's messages until it ends the job."""
        while True:
            with trio.move_on_after(SILENCE_S) as silence:
                received = await self._coordinator.receive()
            if silence.cancelled_caught:
                raise NetworkError(f"coordinator silent for {SILENCE_S:g} s", code="coordinator_lost")
            if received is None:
                raise NetworkError("the coordinator closed the job stream", code="coordinator_lost")
            message, body = received
            if isinstance(message, End):
                return
            if isinstance(message, Prompt):
                self._take_prompt(body)
            elif not isinstance(message, Ping):
                raise ProtocolError(f"{type(message).__name__} on a running job", code="unexpected_message")

    def _take_prompt(self, body: bytearray) -> None:
        if self._prompt_came.is_set():
            raise ProtocolError("a second prompt for one job", code="bad_prompt")
        self._prompt = self._session.accept_prompt(body)
        self._prompt_came.set()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(PING_S)
            try:
                await self._coordinator.send(Ping())
            except NetworkError:
                return  # listen() sees the same end and tells why

    async def _guard(self, part: Callable[[], Awaitable[None]], blamed: str) -> None:
        try:
            await part()
        except AzuError as error:
            if isinstance(error, NetworkError) and self._link is not None:
                blamed = self._link.peer_id  # to which alone a computation sends what the job depends on
            if isinstance(error, ProtocolError):
                self._overlay.count_violation(blamed)
            await self._fail(error, blamed)

    async def _fail(self, error: AzuError, peer_id: str) -> None:
        # A neighbour that got the job's end first closes its stream first: only the coordinator knows if it is a loss.
        level = logging.DEBUG if isinstance(error, NetworkError) else logging.WARNING
        log(logger, level, "job cannot go on", job=self.ticket.job_id.hex(), code=error.code, reason=str(error))
        if self._has_failed:
            return
        self._has_failed = True
        message = "internal error" if isinstance(error, InternalError) else error.message[:2_000]
        try:
            await self._coordinator.send(Failed(code=error.code, message=message, peer_id=peer_id))
        except NetworkError:
            log(logger, logging.DEBUG, "coordinator not told", job=self.ticket.job_id.hex())

    async def _compute(self) -> None:
        session, stage = self._session, self._stage
        if session.needs_prompt:
            await self._prompt_came.wait()
        tokens = self.ticket.total_tokens
        state = await self._device.run(partial(stage.open_job, self.ticket.sampling, self._prompt, tokens))
        self._state = state
        if session.is_first:
            for ids, sample in session.prompt_chunks(self._prompt):
                position = state.position
                self._note_input(struct.pack(f"<{len(ids)}I", *ids))
                output = await self._run(Step(state, ids, len(ids), sample))
                await self._pass_on(output, position, sample)
        since = time.perf_counter()
        async for message, body, rows in self._inbox:
            self._meter.note_input(len(body), time.perf_counter() - since)
            await self._step(state, message, body, rows)
            since = time.perf_counter()

    async def _step(self, state: JobState, message: Chunk | Next, body: bytearray, rows: int) -> None:
        position = state.position
        if isinstance(message, Next):
            sample = True
            output = await self._run(Step(state, (message.token,), 1, sample))
        else:
            sample = message.sample
            self._note_input(body)
            output = await self._run(Step(state, body, rows, sample))
            await self._give_credit()
        await self._pass_on(output, position, sample)

    async def _run(self, step: Step) -> Output:
        returns_to = id(step.job) if step.sample else 0
        output: Output = await self._device.step(self._stage, step, step.rows, returns_to)
        return output

    async def _give_credit(self) -> None:
        self._taken += 1
        if self._taken % GRANT == 0 and (channel := self._intake.channel) is not None:
            try:
                await channel.send(Credit(frames=GRANT))
            except NetworkError:
                return  # receive_from() sees the same end and tells whose it is

    async def _pass_on(self, output: Output, position: int, sample: bool) -> None:
        if self._state is not None:
            self._tokens = self._state.position
        if output.tensor is not None and self._link is not None:
            self._last_output = output.body
            await self._link.send_chunk(Chunk(position=position, tensor=output.tensor, sample=sample), output.body)
        elif output.token is not None:
            await self._pass_token(self._session.sampled(output.token))

    async def _pass_token(self, token: Token) -> None:
        """To the first stage first, since the next step waits for it there."""
        self._last_output = struct.pack("<I", token.token)
        if not token.finish:
            next_step = Next(index=token.index, token=token.token)
            if self._link is None:
                self._inbox_in.send_nowait(self._accept(next_step, bytearray()))
            else:
                await self._link.send_next(next_step)
        await self._coordinator.send(token)

    def _note_input(self, body: Buffer) -> None:
        if self._tokens == 0:
            self._first_input.update(body)

    def receipt(self) -> bytes:
        """What this stage did, signed."""
        entry = self.ticket.stages[self.index]
        receipt = Receipt(
            job_id=self.ticket.job_id,
            epoch=self.ticket.epoch,
            stage=self.index,
            peer_id=entry.peer_id,
            start=entry.start,
            end=entry.end,
            tokens=self._tokens,
            first_input=self._first_input.hexdigest(),
            last_output=hashlib.sha256(self._last_output).hexdigest(),
            issued_at=int(time.time()),
        )
        return sign_receipt(self._identity, receipt)
