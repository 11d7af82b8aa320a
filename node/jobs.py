"""All jobs of a worker: who is let in, how much KV cache they may hold, and which ring stream belongs to which job."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from azu.channel import Channel, refusal_of
from azu.errors import AzuError, InternalError, NetworkError, ProtocolError
from azu.identity import Identity
from azu.logs import log
from azu.models.memory import MAX_JOBS
from azu.overlay import Overlay, OverlayStream
from azu.tickets import JobTicket, LoadedLayers, Refusal, check_ticket, open_ticket, sign_receipt
from azu.wire.messages import JOB, LEAVING, PACK, RING, Amend, Failed, Hello, Open, ReceiptReply, Refused
from node.book import Book, entry_of
from node.engine.device import DeviceThread
from node.engine.pace import Pace
from node.engine.stage import LoadedStage
from node.history import HistoryBudget
from node.instruments import RingMeter
from node.job import StageJob
from node.kv_room import KvRoom
from node.leg import Surroundings
from node.line import Line
from node.packs import Entry, Packs, entries_of

__all__ = ["HISTORY_BYTES", "Jobs", "Loaded"]

logger = logging.getLogger(__name__)

# A peer that opened a stream has this long to say why.
_FIRST_MESSAGE_S = 10.0
# A ring stream may come before its job's ticket does, by the difference of two peers' distance from the coordinator;
_TICKET_LAG_S = 10.0
# and before the leg that it is for begins, since the step that is being computed is waited for.
_LEG_LAG_S = 60.0
# A worker that leaves waits so long for coordinators that are away: nobody else can move their jobs.
_AWAY_S = 10.0
HISTORY_BYTES = 512 << 20  # of main memory, for what may have to be sent again
_MAX_TICKET_BYTES = 65_536
# Ended jobs that are remembered so that their tickets are not honoured twice; 160 bytes each.
_MAX_ENDED = 65_536


@dataclass(frozen=True, slots=True)
class Loaded:
    """What this worker has in memory, and the positions of KV cache that fit beside it."""

    manifest: str
    start: int
    end: int
    stage: LoadedStage
    kv_tokens: int
    kv_bytes_per_token: int
    layer_us: int
    context_length: int
    model_id: str = ""
    pace: Pace = field(default_factory=Pace)

    @property
    def layers(self) -> LoadedLayers:
        """As tickets are held against it."""
        stage = self.stage
        return LoadedLayers(self.manifest, self.start, self.end, stage.model_layers, stage.dtype)


class Jobs:
    """The job table. `loaded` is set by the worker, and only while no job runs."""

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        device: DeviceThread,
        *,
        is_trusted: Callable[[str], bool],
        meter: RingMeter | None = None,
        history: int = HISTORY_BYTES,
        book: Book | None = None,
    ) -> None:
        self.kv = KvRoom()
        self.admitted = 0  # jobs since the start
        self.is_leaving = False
        self.meter = meter or RingMeter()
        self.packs = Packs(overlay)
        self.history = HistoryBudget(history)
        self._identity = identity
        self._overlay = overlay
        self._device = device
        self._is_trusted = is_trusted
        self._loaded: Loaded | None = None
        self._book = book
        self._jobs: dict[bytes, StageJob] = {}
        self._ended: OrderedDict[bytes, int] = OrderedDict()  # the last epoch by job id, the oldest first
        self._packing: dict[str, trio.CancelScope] = {}  # by peer, while it sends packs
        self._serving = 0  # jobs that run, or have ended and whose coordinator has not got the receipt yet
        self._changed = trio.Event()  # set when a job or a leg begins, or a job ends or is served, and then replaced

    @property
    def loaded(self) -> Loaded | None:
        """What jobs run on."""
        return self._loaded

    @loaded.setter
    def loaded(self, loaded: Loaded | None) -> None:
        self._loaded = loaded
        self.kv = KvRoom() if loaded is None else KvRoom(loaded.kv_tokens, loaded.stage.kv_block)

    @property
    def count(self) -> int:
        """Jobs that are running."""
        return len(self._jobs)

    @property
    def kv_tokens_filled(self) -> int:
        """Positions of KV cache that running jobs have computed, of those that they hold."""
        return sum(job.position for job in self._jobs.values())

    def leave(self) -> None:
        """Let no more jobs in, and have others take over those that run."""
        self.is_leaving = True
        for job in self._jobs.values():
            job.leave()

    async def until_served(self) -> None:
        """Wait until no job runs, and whatever coordinators are to be told of those that have ended is told. Jobs whose
        coordinators are away are waited for for a moment only.
        """
        while self._serving:
            with trio.move_on_after(_AWAY_S) as patience:
                await self._changed.wait()
            are_here = self._serving > self.count or any(job.line.is_up for job in self._jobs.values())
            if patience.cancelled_caught and not are_here:
                return

    async def handle_job(self, stream: OverlayStream) -> None:
        """Serve a /azu/job/1 stream: one job, until the coordinator ends it."""
        channel = Channel(stream, JOB, max_body=_MAX_TICKET_BYTES)
        with _deadline(_FIRST_MESSAGE_S, stream.peer_id):
            message, body = await channel.expect(Open, Amend)
        envelope = bytes(body)
        try:
            signer, ticket = open_ticket(envelope)
        except AzuError as error:
            await channel.send(refusal_of(error))
            raise
        if isinstance(message, Amend):
            await self._take_up(channel, message, envelope, ticket)
        elif isinstance(message, Open):
            await self._run(channel, message, envelope, signer, ticket)

    async def _take_up(self, channel: Channel, message: Amend, envelope: bytes, ticket: JobTicket) -> None:
        """Go on with a job that is kept for a coordinator which has come back, or for one that follows it."""
        job = self._jobs.get(ticket.job_id)
        if job is None:
            await _refuse(channel, ticket, Refusal("unknown_job", "this job is not kept here, or not any more"))
        elif (refusal := job.take_up(channel, message, envelope)) is not None:
            await _refuse(channel, ticket, refusal)
        else:
            _limit(channel, ticket)
            await job.line.until_left(channel)

    async def _end_kept(self, ticket: JobTicket, signer: str, sender: str) -> None:
        """End a job that is kept for a coordinator which gives its stage out anew."""
        job = self._jobs.get(ticket.job_id)
        if job is None or job.line.is_up or ticket.epoch <= job.ticket.epoch:
            return
        if signer == sender and job.ticket.may_be_led_by(signer) and self._is_trusted(signer):
            job.line.give_up()
            while self._jobs.get(ticket.job_id) is job:
                await self._changed.wait()

    async def _run(self, channel: Channel, message: Open, envelope: bytes, signer: str, ticket: JobTicket) -> None:
        await self._end_kept(ticket, signer, channel.peer_id)
        loaded = self.loaded
        refusal = self._check(ticket, signer, channel.peer_id)
        index = ticket.stage_of(self._identity.peer_id)
        if refusal is not None or loaded is None or index is None:
            await _refuse(channel, ticket, refusal or Refusal("not_loaded", "nothing is loaded here"))
            return
        _limit(channel, ticket)
        line = Line(channel, message.keep_s)
        around = Surroundings(
            self._identity, self._overlay, self._device, loaded.stage, line, self.meter, self.kv, self.packs
        )
        job = StageJob(
            ticket,
            index,
            around,
            envelope=envelope,
            history=self.history,
            is_trusted=self._is_trusted,
            on_leg=self._wake,
        )
        self._serving += 1
        try:
            await self._serve(job)
        finally:
            self._serving -= 1
            line.close()
            self._wake()

    async def _serve(self, job: StageJob) -> None:
        try:
            with self._admitted(job):
                self._wake()
                await job.run()
        except AzuError:
            await self._account(job)
            raise
        receipt = await self._account(job)
        # Only now, with its room free again: the coordinator may send the next job as soon as it reads this.
        if job.expiry.cancelled_caught:
            log(logger, logging.WARNING, "job expired", job=job.ticket.job_id.hex())
            me = self._identity.peer_id
            await job.line.send(Failed(code="job_expired", message="its ticket expired", peer_id=me))
        else:
            await job.line.send(ReceiptReply(), receipt)

    async def _account(self, job: StageJob) -> bytes:
        """The receipt of an ended job, signed, and written down."""
        receipt = job.receipt()
        envelope = sign_receipt(self._identity, receipt)
        if self._book is not None and receipt.tokens:
            try:
                await self._book.write(entry_of(job.ticket, receipt, job.counted, (job.envelope, envelope)))
            except InternalError as error:  # the coordinator may know of it all the same
                log(logger, logging.ERROR, "earnings not written down", job=job.ticket.job_id.hex(), reason=str(error))
        return envelope

    async def handle_ring(self, stream: OverlayStream) -> None:
        """Serve a /azu/ring/1 stream: hand it to the job that it names."""
        channel = Channel(stream, RING, max_body=0)
        with _deadline(_FIRST_MESSAGE_S, stream.peer_id):
            hello, _ = await channel.expect(Hello)
        job = await self._job(hello)
        if job is None:
            await channel.send(Refused(code="unknown_job", message="no ticket for this job came here"))
        elif hello.epoch < job.epoch:  # no fault of a peer that was stopped for a while
            await channel.send(Refused(code="stale_epoch", message="other peers have taken this job over"))
        else:
            await job.receive_from(channel, hello)

    async def handle_pack(self, stream: OverlayStream) -> None:
        """Serve a /azu/pack/1 stream: decoded tokens of any of the jobs that run here. A peer has one such stream."""
        channel = Channel(stream, PACK)
        with trio.CancelScope() as scope:
            if (older := self._packing.get(stream.peer_id)) is not None:
                older.cancel()
            self._packing[stream.peer_id] = scope
            try:
                while (received := await channel.receive()) is not None:
                    self.meter.links.note_heard(stream.peer_id, trio.current_time())
                    for entry in entries_of(*received):
                        await self._take(entry, stream.peer_id)
            finally:
                if self._packing[stream.peer_id] is scope:
                    del self._packing[stream.peer_id]

    async def _take(self, entry: Entry, sender: str) -> None:
        """Give a token to its job. What comes for one that has ended, or went on otherwise, was under way then."""
        job = self._jobs.get(entry.job_id)
        if job is None and entry.job_id not in self._ended:
            raise ProtocolError("a token came for a job that never was here", code="unknown_job")
        if job is None or job.epoch != entry.epoch:
            return
        if job.previous != sender:
            raise ProtocolError(f"{sender} is not the previous stage of this job", code="not_a_neighbour")
        try:
            job.take(entry)
        except ProtocolError as error:
            await job.fail(error)
            raise

    async def _job(self, hello: Hello) -> StageJob | None:
        """The job that a ring stream is for, once it has got to the stream's epoch."""
        with trio.move_on_after(_LEG_LAG_S if hello.job_id in self._jobs else _TICKET_LAG_S):
            while (job := self._jobs.get(hello.job_id)) is None or job.epoch < hello.epoch:
                await self._changed.wait()
            return job
        return None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _check(self, ticket: JobTicket, signer: str, sender: str) -> Refusal | None:
        loaded = self.loaded
        if self.is_leaving:
            return Refusal(LEAVING, "this worker is about to leave the swarm", "Other workers take the job")
        refusal = check_ticket(
            ticket,
            signer=signer,
            sender=sender,
            me=self._identity.peer_id,
            now=time.time(),
            is_trusted=self._is_trusted,
            loaded=loaded.layers if loaded else None,
        )
        if refusal is not None:
            return refusal
        if ticket.job_id in self._jobs:
            return Refusal("duplicate_job", "this job is already running here")
        if ticket.epoch <= self._ended.get(ticket.job_id, -1):
            return Refusal("duplicate_job", "this job has ended here; its ticket is worth one job")
        if loaded is not None and ticket.total_tokens > loaded.context_length:
            return Refusal(
                "too_long",
                f"the job may need {ticket.total_tokens} positions, the model attends to {loaded.context_length}",
                "Ask for a shorter answer, or with a shorter prompt",
            )
        if len(self._jobs) >= MAX_JOBS:
            return Refusal("no_capacity", f"{MAX_JOBS} jobs are running here", "Try again when one has ended")
        if not self.kv.can_enter(ticket):
            return Refusal(
                "no_capacity",
                f"the job has a prompt of {ticket.prompt_tokens} tokens and may come to {ticket.total_tokens}; there "
                f"is KV cache for {self.kv.tokens}, of which a new job may take {self.kv.room} to begin with",
                "Try again when other jobs have ended, or with a smaller max_tokens",
            )
        return None

    @contextmanager
    def _admitted(self, job: StageJob) -> Iterator[None]:
        kv = self.kv
        kv.enter(job.ticket)
        self._jobs[job.ticket.job_id] = job
        self.admitted += 1
        try:
            yield
        finally:
            del self._jobs[job.ticket.job_id]
            kv.leave(job.ticket)
            self._ended[job.ticket.job_id] = job.ticket.epoch
            self._wake()
            if len(self._ended) > _MAX_ENDED:
                self._ended.popitem(last=False)


async def _refuse(channel: Channel, ticket: JobTicket, refusal: Refusal) -> None:
    log(logger, logging.INFO, "job refused", job=ticket.job_id.hex(), code=refusal.code)
    await channel.send(Refused(code=refusal.code, message=refusal.message, remedy=refusal.remedy))


def _limit(channel: Channel, ticket: JobTicket) -> None:
    channel.limit_body(max(4 * ticket.prompt_tokens, 4 * ticket.max_tokens, _MAX_TICKET_BYTES))


@contextmanager
def _deadline(seconds: float, peer_id: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise NetworkError(f"{peer_id} said nothing for {seconds:g} s", code="peer_silent") from None
