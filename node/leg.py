"""One leg of a job in one stage: its ring as one ticket names it, until a peer is replaced and the next leg begins.

    previous ────ring streams─► receive    chunks (in the first stage: sampled tokens), checked, onto a bounded agenda
    agenda ───────────────────► compute    one step at a time on the device thread, results passed on
    next ◄───────ring streams── outlet     what was computed; credit comes back

A decoded token needs no task where nothing has to be waited for, and shares a frame with those of other jobs:

    previous ────────────packs─► take ───► device thread ───► land ──packs────► next

A leg is paused between two steps: what the device thread has begun is waited for and noted, so that what the stage
holds of the job stays whole. In a leg that is not the job's first, the coordinator says where to go on, and from which
position on the next stage needs to be sent what it lacks: out of the history, or as it is computed anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import outcome
import trio

from azu.channel import Channel
from azu.crossings import SeamLog
from azu.errors import AzuError, InternalError, NetworkError, ProtocolError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import Overlay
from azu.tickets import JobTicket
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
    Waiting,
)
from node.agenda import Agenda, Input, PausedError, Result
from node.engine.device import DeviceThread
from node.engine.stage import JobState, LoadedStage, Output, Step
from node.instruments import RingMeter
from node.intake import Intake, Part
from node.kv_room import KvRoom
from node.line import Line
from node.outlet import Outlet
from node.packs import Entry, Packs
from node.progress import Progress
from node.ring import GRANT, TOKEN_GRANT, WINDOW, RingLink
from node.session import StageSession

__all__ = ["Leg", "Surroundings"]

logger = logging.getLogger(__name__)


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
    packs: Packs


class Leg:
    """Stage `index` of a ticket's job, with this ticket's neighbours.

    Attributes:
        received: the hidden states that it computed on.
    """

    def __init__(self, ticket: JobTicket, index: int, around: Surroundings, progress: Progress) -> None:
        self.ticket = ticket
        self.received = SeamLog()
        self.index = index
        self._around = around
        self._progress = progress
        self._session = self._new_session()
        self._tokens: tuple[int, ...] = ()  # that were sampled before the leg began
        self._begun = trio.Event()
        if ticket.epoch == 0:
            self._begun.set()
        self._agenda = Agenda()
        self._idle_since = 0.0  # by a steady clock
        self._has_failed = False
        self._number = 0  # of the job, for the device thread
        self._give_up: Callable[[], None] | None = None  # the step that is computed without the task
        self._owed = 0  # chunks that were taken and not given credit for
        hello = Hello(job_id=ticket.job_id, epoch=ticket.epoch, stage=index)
        count = len(ticket.stages)
        next_peer = ticket.stages[(index + 1) % count].peer_id
        self._link = RingLink(around.overlay, next_peer, hello, around.packs, around.meter) if count > 1 else None
        theirs = hello.model_copy(update={"stage": (index - 1) % count})
        self._intake = Intake(theirs, ticket.stages[index - 1].peer_id, self._session.max_body)
        self._outlet = Outlet(self._session, self._link, around.coordinator, self._agenda, self._take_token)

    @property
    def previous(self) -> str:
        """The previous stage's peer id."""
        return self._intake.peer_id

    @property
    def sent(self) -> SeamLog:
        """The hidden states that it gave to the next stage."""
        return self._outlet.sent

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
        self._session = self._new_session(message.known, message.position, message.send_from)
        self._outlet.session, self._outlet.send_from = self._session, message.send_from
        self._begun.set()

    def pause(self) -> None:
        """End `run` after the step that is being computed."""
        self._agenda.pause()

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
                await self.fail(error, channel.peer_id)
                raise

    async def _receive(self, part: Part) -> None:
        channel = part.channel
        while (received := await channel.receive()) is not None:
            message, body = received
            self._around.meter.links.note_heard(channel.peer_id, trio.current_time())
            if isinstance(message, Moved):
                await self._intake.follow(message)
                return
            self._put(self._accept(message, body))
        raise NetworkError(f"{channel.peer_id} closed the ring", code="stage_lost")

    def _accept(self, message: Message, body: bytearray) -> Input:
        """Check a message as it comes: what is wrong with it is its sender's fault, and nobody else's."""
        session = self._session
        if isinstance(message, Next):
            return self._note_token(session.accept_next(message.index, message.token))
        if isinstance(message, Chunk):
            rows = session.accept_chunk(message, len(body))
            return Input(message.position, rows, message.sample, body, is_owed=True)
        raise ProtocolError(f"{type(message).__name__} on the ring", code="unexpected_message")

    def _note_token(self, token: int) -> Input:
        if not self._session.is_last:
            self._progress.tokens.append(token)
        return Input(self._session.position - 1, 1, sample=True, token=token)

    def take(self, entry: Entry) -> None:
        """Take a decoded token that the previous stage sent in a pack.

        Raises:
            ProtocolError: it is not what comes next.
        """
        session = self._session
        if self._agenda.is_paused:
            return
        if entry.token >= 0:
            self._put(self._note_token(session.accept_packed_next(entry.position, entry.token)))
        else:
            session.accept_row(entry.position, entry.dtype, len(entry.body))
            self._put(Input(entry.position, 1, True, entry.body))

    def _take_token(self, index: int, token: int) -> None:
        """What was sampled here begins the next step."""
        self._put(self._note_token(self._session.accept_next(index, token)))

    def _put(self, work: Input) -> None:
        """Compute it at once where that can be, or leave it to the task.

        Raises:
            ProtocolError: more wait than may be under way.
        """
        if len(self._agenda.inputs) == WINDOW:
            raise ProtocolError(f"{self.previous} sent more than it has credit for", code="no_credit")
        if not (self._agenda.is_clear and self._compute_at_once(work)):
            self._agenda.put(work)

    def _compute_at_once(self, work: Input) -> bool:
        """Have a decoded token computed that no task waits for; False where something has to be waited for."""
        state, is_decoded = self._progress.state, work.rows == 1 and work.sample and not work.is_owed
        if not is_decoded or state is None or not self._has_room(1):
            return False
        step = self._begin(state, work)
        self._agenda.is_stepping = True
        self._give_up = self._around.device.submit(state.stage, step, 1, self._number, partial(self._land, step))
        return True

    def _land(self, step: Step, came: outcome.Outcome[Output]) -> None:
        """A step that was computed without the task is over."""
        self._give_up = None
        self._agenda.landed()
        try:
            result = self._keep(step, came.unwrap())
            if result is not None and not self._outlet.pass_at_once(result):
                self._agenda.pass_on(result)
        except Exception as error:  # the task's to raise
            self._progress.clear()
            self._agenda.fail(error)

    # --- the leg itself

    async def run(self) -> None:
        """Run until paused."""
        reports = self._around.packs.held(self.ticket.coordinator) if self._session.is_last else nullcontext()
        with reports as self._outlet.reports:
            await self._run_parts()

    async def _run_parts(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                if self._link is not None:
                    nursery.start_soon(self._guard, partial(self._link.run, self._ready), self._link.peer_id)
                await self._guard(self._compute, self._around.identity.peer_id)
                await self._agenda.until_landed()
                await self._agenda.until_paused()
                nursery.cancel_scope.cancel()
        finally:
            if self._give_up is not None:
                self._give_up()
            self._intake.close()
            self._around.device.ended(self._number)

    async def _ready(self) -> None:
        await self._around.coordinator.send(Ready())

    async def _guard(self, part: Callable[[], Awaitable[None]], blamed: str) -> None:
        try:
            with suppress(PausedError):
                await part()
        except AzuError as error:
            if isinstance(error, NetworkError) and self._link is not None:
                blamed = self._link.peer_id  # to which alone a computation sends what the job depends on
            if isinstance(error, ProtocolError):
                self._around.overlay.count_violation(blamed)
            await self.fail(error, blamed)

    async def fail(self, error: AzuError, peer_id: str) -> None:
        """Tell the coordinator, once, that the leg cannot go on, and whose fault it seems."""
        # A neighbour that got the job's end first closes its stream first: only the coordinator knows if it is a loss.
        level = logging.DEBUG if isinstance(error, NetworkError) else logging.WARNING
        job = self.ticket.job_id.hex()
        log(logger, level, "job cannot go on", job=job, code=error.code, reason=str(error))
        if self._has_failed or self._agenda.is_paused:
            return
        self._has_failed = True
        message = "internal error" if isinstance(error, InternalError) else error.message[:2_000]
        await self._around.coordinator.send(Failed(code=error.code, message=message, peer_id=peer_id))

    async def _compute(self) -> None:
        with self._agenda.pausable():
            if self._link is None:
                await self._ready()
            await self._begun.wait()
            if self._session.needs_prompt:
                await self._progress.prompt_came.wait()
        state = await self._take_up()
        await self._outlet.replay(self._progress.history)
        if self._session.is_first:
            for ids, sample in self._session.id_chunks(self._progress.prompt + self._tokens):
                await self._run(Step(state, ids, len(ids), sample))
        self._idle_since = time.perf_counter()
        while True:
            work = await self._agenda.next()
            if not isinstance(work, Input):
                await self._outlet.pass_on(work)
            elif not self._compute_at_once(work):
                await self._run(self._begin(state, work))
                if work.is_owed:
                    await self._give_credit(work.rows)

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

    def _begin(self, state: JobState, work: Input) -> Step:
        self._around.meter.note_input(len(work.body), time.perf_counter() - self._idle_since)
        if work.token >= 0:
            return Step(state, (work.token,), 1, sample=True)
        self.received.note(work.position, work.rows, work.body)
        return Step(state, work.body, work.rows, work.sample)

    def _has_room(self, rows: int) -> bool:
        return self._around.kv.grow_at_once(self.ticket.job_id, self._progress.positions + rows)

    async def _run(self, step: Step) -> None:
        """Compute a step, and pass on what it gives."""
        if not self._has_room(step.rows):
            kv, positions = self._around.kv, self._progress.positions + step.rows
            with self._agenda.pausable():
                await kv.grow(self.ticket.job_id, positions, self._tell_waiting)
        try:
            returns_to = self._number if step.sample else 0
            output: Output = await self._around.device.step(step.job.stage, step, step.rows, returns_to)
        except AzuError:
            self._progress.clear()  # a cache that a failed step may have touched is of no use to a later leg
            raise
        result = self._keep(step, output)
        if result is not None and not self._outlet.pass_at_once(result):
            await self._outlet.pass_on(result)

    def _keep(self, step: Step, output: Output) -> Result | None:
        """What a step gave becomes part of what the stage holds of the job. Returns what is to be passed on."""
        self._idle_since = time.perf_counter()
        progress, position = self._progress, self._progress.positions
        progress.positions += step.rows
        token = None
        if output.token is not None:
            progress.tokens.append(output.token)
            token = self._session.sampled(output.token)
        elif output.tensor is None:
            return None
        elif self._link is not None:
            progress.history.add(output.body)
        return Result(position, step.rows, output.body, token)

    async def _tell_waiting(self) -> None:
        await self._around.coordinator.send(Waiting())

    async def _give_credit(self, rows: int) -> None:
        self._owed += 1
        if self._owed < (GRANT if rows > 1 else TOKEN_GRANT) or (channel := self._intake.channel) is None:
            return
        frames, self._owed = self._owed, 0
        try:
            with self._agenda.pausable():
                await channel.send(Credit(frames=frames))
        except NetworkError:
            return  # receive_from() sees the same end and tells whose it is
