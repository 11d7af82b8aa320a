"""One leg of a job in one stage: its ring as one ticket names it, until a peer is replaced and the next leg begins.

    previous ────ring streams─► receive    chunks (in the first stage: sampled tokens), checked, into a bounded inbox
    inbox ────────────────────► compute    one step at a time on the device thread, results passed on
    next ◄───────ring streams── link       what was computed; credit comes back

A leg is paused between two steps: what the device thread has begun is waited for and noted, so that what the stage
holds of the job stays whole. In a leg that is not the job's first, the coordinator says where to go on, and from which
position on the next stage needs to be sent what it lacks: out of the history, or as it is computed anew.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from azu.channel import Channel
from azu.crossings import SeamLog
from azu.errors import AzuError, InternalError, NetworkError, ProtocolError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import Overlay
from azu.tickets import JobTicket
from azu.wire.frames import Buffer
from azu.wire.messages import (
    Chunk,
    Credit,
    Failed,
    Hello,
    Message,
    Moved,
    Next,
    Ready,
    Resume,
    Token,
    Waiting,
)
from azu.wire.tensors import ITEMSIZE, TensorHeader
from node.engine.device import DeviceThread
from node.engine.stage import JobState, LoadedStage, Output, Step
from node.instruments import RingMeter
from node.intake import Intake, Part
from node.kv_room import KvRoom
from node.line import Line
from node.progress import Progress
from node.ring import GRANT, TOKEN_GRANT, WINDOW, RingLink
from node.session import StageSession

__all__ = ["Leg", "Surroundings"]

logger = logging.getLogger(__name__)

# A checked message of the ring, its body and its rows.
Work = tuple[Chunk | Next, bytearray, int]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a job runs with."""

    identity: Identity
    overlay: Overlay
    device: DeviceThread
    stage: LoadedStage
    coordinator: Line
    meter: RingMeter
    kv: KvRoom


class _PausedError(Exception):
    """The leg ends here."""


class Leg:
    """Stage `index` of a ticket's job, with this ticket's neighbours.

    Attributes:
        received, sent: the hidden states that it computed on, and those that it gave to the next stage.
    """

    def __init__(self, ticket: JobTicket, index: int, around: Surroundings, progress: Progress) -> None:
        self.ticket = ticket
        self.received, self.sent = SeamLog(), SeamLog()
        self.index = index
        self._around = around
        self._progress = progress
        self._session = self._new_session()
        self._tokens: tuple[int, ...] = ()  # that were sampled before the leg began
        self._send_from = 0
        self._begun = trio.Event()
        if ticket.epoch == 0:
            self._begun.set()
        self._paused = trio.Event()
        self._wait = trio.CancelScope()  # what is waited for between two steps
        self._has_failed = False
        self._number = 0  # of the job, for the device thread
        self._inbox: deque[Work] = deque()
        self._has_work = trio.Event()  # set with work and by a pause, and then replaced
        self._owed = 0  # chunks that were taken and not given credit for
        hello = Hello(job_id=ticket.job_id, epoch=ticket.epoch, stage=index)
        count = len(ticket.stages)
        next_peer = ticket.stages[(index + 1) % count].peer_id
        self._link = RingLink(around.overlay, next_peer, hello, around.meter) if count > 1 else None
        theirs = hello.model_copy(update={"stage": (index - 1) % count})
        self._intake = Intake(theirs, ticket.stages[index - 1].peer_id, self._session.max_body)

    def _new_session(self, known: int = 0, position: int = 0, next_position: int = 0) -> StageSession:
        stage = self._around.stage
        return StageSession(
            self.ticket,
            self.index,
            hidden_size=stage.hidden_size,
            vocab_size=stage.vocab_size,
            known=known,
            position=position,
            next_position=next_position,
        )

    # --- from the coordinator

    def resume(self, message: Resume, body: bytearray) -> None:
        """Begin, where the coordinator says.

        Raises:
            ProtocolError: the leg has begun, or cannot begin so.
        """
        if self._begun.is_set():
            raise ProtocolError("a job was to go on that had not been paused", code="unexpected_message")
        progress = self._progress
        self._tokens = self._session.accept_resume(message, body, progress.positions)
        if message.position == 0:
            progress.clear()
        elif not self._session.is_last and not progress.history.has(message.send_from, message.position):
            raise ProtocolError("what this stage sent before is not here any more", code="bad_resume")
        progress.tokens = list(self._tokens)
        self._send_from = message.send_from
        self._session = self._new_session(message.known, message.position, message.send_from)
        self._begun.set()

    def pause(self) -> None:
        """End `run` after the step that is being computed."""
        self._paused.set()
        self._has_work.set()
        self._wait.cancel()

    # --- from the previous stage

    async def receive_from(self, channel: Channel, hello: Hello) -> None:
        """Take what the previous stage sends on a ring stream, until the leg ends or the ring moves to another one.

        Raises:
            NetworkError: the stream broke.
            ProtocolError: the stream is not from this job's previous stage, or breaks the protocol.
        """
        part = self._intake.admit(channel, hello)
        with part.scope:
            await part.its_turn()
            try:
                await self._begun.wait()  # this stage may be told to go on later than the previous one
                await self._receive(part)
            except AzuError as error:
                await self._fail(error, channel.peer_id)
                raise

    async def _receive(self, part: Part) -> None:
        channel = part.channel
        while (received := await channel.receive()) is not None:
            message, body = received
            self._around.meter.links.note_heard(channel.peer_id, trio.current_time())
            if isinstance(message, Moved):
                await self._intake.follow(message)
                return
            if len(self._inbox) == WINDOW:
                raise ProtocolError(f"{channel.peer_id} sent more than it has credit for", code="no_credit")
            self._put(self._accept(message, body))
        raise NetworkError(f"{channel.peer_id} closed the ring", code="stage_lost")

    def _put(self, work: Work) -> None:
        self._inbox.append(work)
        self._has_work.set()

    async def _get(self) -> Work:
        """The next of the inbox. Without a scope of its own, as the ring's next step waits for this."""
        while not self._paused.is_set():
            if self._inbox:
                return self._inbox.popleft()
            self._has_work = trio.Event()
            await self._has_work.wait()
        raise _PausedError

    def _accept(self, message: Message, body: bytearray) -> Work:
        """Check a message as it comes: what is wrong with it is its sender's fault, and nobody else's."""
        if isinstance(message, Next):
            token = self._session.accept_next(message)
            if not self._session.is_last:
                self._progress.tokens.append(token)
            return message, body, 1
        if isinstance(message, Chunk):
            return message, body, self._session.accept_chunk(message, len(body))
        raise ProtocolError(f"{type(message).__name__} on the ring", code="unexpected_message")

    # --- the leg itself

    async def run(self) -> None:
        """Run until paused."""
        try:
            async with trio.open_nursery() as nursery:
                if self._link is not None:
                    nursery.start_soon(self._guard, partial(self._link.run, self._ready), self._link.peer_id)
                await self._guard(self._compute, self._around.identity.peer_id)
                await self._paused.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._intake.close()
            self._around.device.ended(self._number)

    async def _ready(self) -> None:
        await self._around.coordinator.send(Ready())

    async def _guard(self, part: Callable[[], Awaitable[None]], blamed: str) -> None:
        try:
            with suppress(_PausedError):
                await part()
        except AzuError as error:
            if isinstance(error, NetworkError) and self._link is not None:
                blamed = self._link.peer_id  # to which alone a computation sends what the job depends on
            if isinstance(error, ProtocolError):
                self._around.overlay.count_violation(blamed)
            await self._fail(error, blamed)

    async def _fail(self, error: AzuError, peer_id: str) -> None:
        # A neighbour that got the job's end first closes its stream first: only the coordinator knows if it is a loss.
        level = logging.DEBUG if isinstance(error, NetworkError) else logging.WARNING
        job = self.ticket.job_id.hex()
        log(logger, level, "job cannot go on", job=job, code=error.code, reason=str(error))
        if self._has_failed or self._paused.is_set():
            return
        self._has_failed = True
        message = "internal error" if isinstance(error, InternalError) else error.message[:2_000]
        await self._around.coordinator.send(Failed(code=error.code, message=message, peer_id=peer_id))

    def _sending(self, link: RingLink) -> AbstractContextManager[None]:
        """As `_pausable`, for what is sent on. What need not be waited for takes no scope."""
        return nullcontext() if link.is_ready and not self._paused.is_set() else self._pausable()

    @contextmanager
    def _pausable(self) -> Iterator[None]:
        """What is waited for in here is given up when the leg is paused."""
        with trio.CancelScope() as self._wait:
            if self._paused.is_set():
                self._wait.cancel()
            yield
        if self._wait.cancelled_caught:
            raise _PausedError

    async def _compute(self) -> None:
        with self._pausable():
            if self._link is None:
                await self._ready()
            await self._begun.wait()
            if self._session.needs_prompt:
                await self._progress.prompt_came.wait()
        state = await self._take_up()
        await self._replay()
        if self._session.is_first:
            for ids, sample in self._session.id_chunks(self._progress.prompt + self._tokens):
                await self._run(Step(state, ids, len(ids), sample))
        while True:
            since = time.perf_counter()
            message, body, rows = await self._get()
            self._around.meter.note_input(len(body), time.perf_counter() - since)
            await self._step(state, message, body, rows)

    async def _take_up(self) -> JobState:
        """The state to compute with: as it was left, or a new one."""
        ticket, progress, stage = self.ticket, self._progress, self._around.stage
        if progress.state is None:
            entry, tokens = ticket.stages[self.index], ticket.total_tokens
            part = entry.start, entry.end
            opening = partial(stage.open_job, ticket.sampling, progress.prompt, tokens, self._tokens, part)
            progress.state = await self._around.device.run(opening)
        else:
            stage.go_on(progress.state, ticket.sampling, progress.prompt, self._tokens)
        self._number = id(progress.state)
        return progress.state

    async def _replay(self) -> None:
        """Send on what the next stage lacks of what this one computed before."""
        if self._link is None or self._session.is_last:
            return
        session = self._session
        for position, body in self._progress.history.replay(self._send_from, session.rows):
            rows = len(body) // (session.hidden_size * ITEMSIZE[session.dtype])
            header = TensorHeader(dtype=session.dtype, shape=(rows, session.hidden_size))
            await self._send_on(Chunk(position=position, tensor=header, sample=position + rows == session.base), body)

    async def _step(self, state: JobState, message: Chunk | Next, body: bytearray, rows: int) -> None:
        if isinstance(message, Next):
            await self._run(Step(state, (message.token,), 1, sample=True))
            return
        self.received.note(message.position, rows, body)
        await self._run(Step(state, body, rows, message.sample), self._give_credit)

    async def _run(self, step: Step, then: Callable[[int], Awaitable[None]] | None = None) -> None:
        """Compute a step, and pass on what it gives."""
        progress, position = self._progress, self._progress.positions
        kv, job, positions = self._around.kv, self.ticket.job_id, position + step.rows
        if not kv.grow_at_once(job, positions):
            with self._pausable():
                await kv.grow(job, positions, self._tell_waiting)
        try:
            returns_to = self._number if step.sample else 0
            output: Output = await self._around.device.step(step.job.stage, step, step.rows, returns_to)
        except AzuError:
            progress.clear()  # a cache that a failed step may have touched is of no use to a later leg
            raise
        progress.positions += step.rows
        if output.tensor is not None and self._link is not None:
            progress.history.add(output.body)
        if output.token is not None:
            progress.tokens.append(output.token)
        await self._pass_on(output, position, step)  # first: the rest of the ring waits for it
        if then is not None:
            await then(step.rows)

    async def _tell_waiting(self) -> None:
        await self._around.coordinator.send(Waiting())

    async def _give_credit(self, rows: int) -> None:
        self._owed += 1
        if self._owed < (GRANT if rows > 1 else TOKEN_GRANT) or (channel := self._intake.channel) is None:
            return
        frames, self._owed = self._owed, 0
        try:
            with self._pausable():
                await channel.send(Credit(frames=frames))
        except NetworkError:
            return  # receive_from() sees the same end and tells whose it is

    async def _pass_on(self, output: Output, position: int, step: Step) -> None:
        if output.tensor is not None and self._link is not None:
            skipped = min(max(0, self._send_from - position), step.rows)  # rows that the next stage has
            if skipped == step.rows:
                return
            rows, body, header = step.rows, output.body, output.tensor
            if skipped:
                rows -= skipped
                body = body[len(body) // step.rows * skipped :]
                header = header.model_copy(update={"shape": (rows, self._session.hidden_size)})
            await self._send_on(Chunk(position=position + skipped, tensor=header, sample=step.sample), body)
        elif output.token is not None:
            await self._pass_token(self._session.sampled(output.token))

    async def _send_on(self, chunk: Chunk, body: Buffer) -> None:
        """To the next stage, and note it even where that fails: it may have left."""
        link: Any = self._link  # who calls this has one
        try:
            with self._sending(link):
                await link.send_chunk(chunk, body)
        finally:  # afterwards: the next stage waits for it
            self.sent.note(chunk.position, chunk.tensor.shape[0], body)

    async def _pass_token(self, token: Token) -> None:
        """To the first stage first, since the next step waits for it there."""
        if not token.finish:
            next_step = Next(index=token.index, token=token.token)
            if self._link is None:
                self._put(self._accept(next_step, bytearray()))
            else:
                with self._sending(self._link):
                    await self._link.send_next(next_step)
        with self._pausable():
            await self._around.coordinator.send(token)
