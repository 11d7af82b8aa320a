"""The worker: stays joined, says what it has, loads what it is assigned, and serves jobs and layers."""

from __future__ import annotations

import logging
import time
from functools import partial

import trio

from azu.channel import IDLE_S, Channel, refusal_of
from azu.distribution import LayerServer, Library
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import ANNOUNCE_SECONDS, Overlay, OverlayStream
from azu.records import WORKERS_KEY, HeldRange, Speed, WorkerRecord, sign_worker_record, worker_key
from azu.tickets import Assignment, Refusal, check_assignment, open_assignment
from azu.wire.messages import (
    CONTROL,
    CONTROL_PROTOCOL,
    JOB_PROTOCOL,
    LAYERS_PROTOCOL,
    LEAVING,
    PACK_PROTOCOL,
    RING_PROTOCOL,
    Accepted,
    Assign,
    GetStatus,
    Refused,
    Status,
)
from azu.wire.tensors import WeightFormat
from node.alone import Alone
from node.book import Book
from node.engine.device import DeviceThread
from node.engine.hardware import Device
from node.idle import explain_idleness
from node.instruments import Instruments
from node.jobs import HISTORY_BYTES, Jobs
from node.links import keep_pinging
from node.loader import Loader
from node.owed import keep_asking
from node.supply import Supply
from node.trust import Trust

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

AGENT = "azu-node/0.1.0"
_PROTOCOLS = (CONTROL_PROTOCOL, LAYERS_PROTOCOL, JOB_PROTOCOL, RING_PROTOCOL, PACK_PROTOCOL)
# A record outlives three refreshes, so that one lost in the network does not make a worker vanish.
_REFRESH_S = 15.0
_RECORD_LIFE_S = 60
_RETRY_S = 1.0  # where nobody took it, as before the swarm is joined
# A record has to stay below MAX_RECORD_BYTES.
_MAX_ADDRS, _MAX_RANGES = 16, 48
# Layers that could not be loaded are not tried again for this long: the coordinator gives them to somebody else.
_AFTER_FAILURE_S = 60.0


class Worker:
    """One worker in the swarm. `run()` owns all its tasks."""

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        thread: DeviceThread,
        device: Device,
        library: Library,
        layers: LayerServer,
        *,
        dtype: WeightFormat,
        trust: Trust,
        payout_address: str,
        use_hub: bool = True,
        failover_memory: int = HISTORY_BYTES,
        book: Book | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.layers = layers
        self.instruments = Instruments(thread.passes)
        self.jobs = Jobs(
            identity,
            overlay,
            thread,
            is_trusted=trust,
            meter=self.instruments.ring,
            history=failover_memory,
            book=book,
        )
        self._book = book
        self._identity = identity
        self._overlay = overlay
        self._library = library
        self._trust = trust
        self._loader = Loader(Supply(overlay, library, trust, use_hub=use_hub), thread, device)
        self._payout_address = payout_address
        self._cached: tuple[HeldRange, ...] = ()
        self._loading: HeldRange | None = None
        self._failed: tuple[tuple[str, int, int], str, float] | None = None  # which layers, why, until when to refuse
        self._sequence = 0
        self._assigned_sequences: dict[str, int] = {}  # by coordinator: their clocks may differ
        self._assigned_by = ""  # the coordinator whose assignment was followed last
        self._changed = trio.Event()
        self._orders_in, self._orders = trio.open_memory_channel[Assignment](1)
        self._alone = Alone(overlay, library, trust, self._record, self._take_up)
        self._is_ready = trio.Event()
        # Before the event loop's next turn: who is connected by then must not find a peer that speaks none of these.
        overlay.handle(CONTROL_PROTOCOL, self._handle_control)
        overlay.handle(LAYERS_PROTOCOL, layers.handle)
        overlay.handle(JOB_PROTOCOL, self.jobs.handle_job)
        overlay.handle(RING_PROTOCOL, self.jobs.handle_ring)
        overlay.handle(PACK_PROTOCOL, self.jobs.handle_pack)

    async def run(self) -> None:
        """Serve until cancelled, then withdraw the record."""
        await self._note_cached()
        self._is_ready.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.instruments.run)
                nursery.start_soon(self.jobs.packs.run)
                nursery.start_soon(self._advertise)
                nursery.start_soon(self._provide)
                nursery.start_soon(self._note_what_comes)
                nursery.start_soon(keep_pinging, self._overlay, self.instruments.ring.links)
                nursery.start_soon(self._alone.run)
                if self._book is not None:
                    nursery.start_soon(keep_asking, self._overlay, self._identity.peer_id, self._book)
                nursery.start_soon(
                    partial(
                        explain_idleness,
                        self._overlay,
                        vram=self.device.vram,
                        dtype=self.dtype,
                        is_busy=lambda: self._loading is not None or self.jobs.loaded is not None,
                    )
                )
                await self._follow_orders()
        finally:
            with trio.move_on_after(2, shield=True):
                await self._publish(self.record(life=0))

    async def leave(self, patience: float) -> None:
        """Take no more jobs and no layers, and wait until others have taken over those that run, for so many seconds
        at most.
        """
        log(logger, logging.INFO, "leaving", jobs=self.jobs.count, patience_s=patience)
        self.jobs.leave()
        self._changed.set()
        with trio.move_on_after(patience):
            await self.jobs.until_served()
        if self.jobs.count:
            log(logger, logging.WARNING, "jobs are left that nobody took over", jobs=self.jobs.count)

    @property
    def loading(self) -> HeldRange | None:
        """What is being loaded, if anything is."""
        if self._loading is None:
            return None
        return self._loading.model_copy(update={"percent": self._loader.percent})

    def record(self, life: int = _RECORD_LIFE_S) -> bytes:
        """This worker's signed record as of now, in force for `life` seconds."""
        return sign_worker_record(self._identity, self._record(life))

    def _record(self, life: int = _RECORD_LIFE_S) -> WorkerRecord:
        now = time.time()
        self._sequence = max(self._sequence + 1, int(now * 1000))
        loaded = self.jobs.loaded
        ranges = list(self._cached)
        if (loading := self.loading) is not None:
            ranges.append(loading)
        if loaded is not None:
            ranges.append(HeldRange(manifest=loaded.manifest, start=loaded.start, end=loaded.end, state="loaded"))
        return WorkerRecord(
            peer_id=self._identity.peer_id,
            sequence=self._sequence,
            issued_at=int(now),
            expires_at=int(now) + life,
            agent=AGENT,
            protocols=_PROTOCOLS,
            addrs=self._overlay.addrs[:_MAX_ADDRS],
            device=self.device.label[:128],
            dtype=self.dtype,
            vram_total=self.device.vram,
            vram_free=self.jobs.kv.free * loaded.kv_bytes_per_token if loaded else self.device.vram,
            kv_tokens=self.jobs.kv.tokens,
            kv_tokens_free=self.jobs.kv.room,
            jobs=self.jobs.count,
            layer_us=loaded.layer_us if loaded else 0,
            ranges=tuple(ranges[-_MAX_RANGES:]),
            payout_address=self._payout_address,
            speed=loaded.pace.speed() if loaded else Speed(),
            waiting=round(self.instruments.waiting),
            links=self.instruments.ring.links.told(trio.current_time()),
            leaving=self.jobs.is_leaving,
            assigned_by=self._owner(),
        )

    async def _advertise(self) -> None:
        while True:
            self._changed = trio.Event()  # before the record is made: what changes while it travels is news again
            is_published = await self._publish(self.record())
            with trio.move_on_after(_REFRESH_S if is_published else _RETRY_S):
                await self._changed.wait()

    async def _publish(self, record: bytes) -> bool:
        try:
            await self._overlay.put_record(worker_key(self._identity.peer_id), record)
        except AzuError as error:
            level = logging.DEBUG if isinstance(error, NetworkError) else logging.WARNING
            log(logger, level, "record not published", reason=str(error))
            return False
        return True

    async def _provide(self) -> None:
        """Make this worker findable: as a worker, and as a holder of the models that it has layers of."""
        provided: dict[bytes, float] = {}
        while True:
            held = self._cached if self._loading is None else (*self._cached, self._loading)
            for key in {WORKERS_KEY, *(bytes.fromhex(each.manifest) for each in held)}:
                if trio.current_time() < provided.get(key, -ANNOUNCE_SECONDS) + ANNOUNCE_SECONDS:
                    continue
                try:
                    await self._overlay.provide(key)
                    provided[key] = trio.current_time()
                except NetworkError as error:
                    log(logger, logging.DEBUG, "not provided", reason=error.message)
            await trio.sleep(1)

    async def _handle_control(self, stream: OverlayStream) -> None:
        channel = Channel(stream, CONTROL)
        await self._is_ready.wait()  # before, its record would not tell what lies on its disk
        while (received := await channel.receive(IDLE_S)) is not None:
            message, body = received
            self._alone.heard(stream.peer_id)
            if isinstance(message, GetStatus):
                await channel.send(Status(), self.record())
            elif isinstance(message, Assign):
                refusal = self._take_order(bytes(body), stream.peer_id)
                await channel.send(Accepted() if refusal is None else refusal)
            else:
                raise ProtocolError(f"{type(message).__name__} is not a request", code="unexpected_message")

    def _take_order(self, envelope: bytes, sender: str) -> Refused | None:
        try:
            signer, assignment = open_assignment(envelope)
        except (TrustError, ProtocolError) as error:
            self._overlay.count_violation(sender)
            return refusal_of(error)
        owner = self._owner()
        refusal = check_assignment(
            assignment,
            signer=signer,
            sender=sender,
            me=self._identity.peer_id,
            now=time.time(),
            is_trusted=self._trust,
            last_sequence=self._assigned_sequences.get(signer, -1),
        )
        if refusal is None and owner not in ("", signer) and not self._is_fulfilled(assignment):
            refusal = Refusal("assigned", f"its layers are those of coordinator {owner}, which is connected")
        refusal = refusal or self._take_up(assignment)
        if refusal is not None:
            log(logger, logging.INFO, "assignment refused", peer=sender, code=refusal.code, reason=refusal.message)
            return Refused(code=refusal.code, message=refusal.message, remedy=refusal.remedy)
        self._assigned_sequences[signer] = assignment.sequence
        self._trust.follow(signer)
        if owner in ("", signer):
            self._assigned_by = signer
        return None

    def _take_up(self, assignment: Assignment) -> Refusal | None:
        """Load layers, if they are not loaded, unless there is a reason not to."""
        if (refusal := self._check_state(assignment)) is not None or self._is_fulfilled(assignment):
            return refusal
        self.jobs.loaded, self._assigned_by = None, ""
        self._loading = HeldRange(
            manifest=assignment.manifest, start=assignment.start, end=assignment.end, state="loading"
        )
        self._orders_in.send_nowait(assignment)
        return None

    def _owner(self) -> str:
        """The coordinator that gave it the layers which it holds, while that is connected."""
        holds = self._loading is not None or self.jobs.loaded is not None
        owner = self._assigned_by if holds else ""
        return owner if owner and self._overlay.is_connected(owner) else ""

    def _check_state(self, assignment: Assignment) -> Refusal | None:
        if self.jobs.is_leaving:
            return Refusal(LEAVING, "this worker is about to leave the swarm")
        if self._loading is not None:
            return Refusal("loading", f"layers {self._loading.start}-{self._loading.end - 1} are being loaded")
        if self.jobs.count and not self._is_fulfilled(assignment):
            return Refusal("busy", f"{self.jobs.count} jobs are running on the layers loaded now")
        if self._failed is not None and self._failed[0] == _layers(assignment) and time.monotonic() < self._failed[2]:
            return Refusal("load_failed", f"these layers could not be loaded a moment ago: {self._failed[1]}"[:2_000])
        if assignment.dtype != self.dtype:
            return Refusal("wrong_dtype", f"this worker runs {self.dtype}, the assignment wants {assignment.dtype}")
        return None

    def _is_fulfilled(self, assignment: Assignment) -> bool:
        loaded = self.jobs.loaded
        return loaded is not None and (loaded.manifest, loaded.start, loaded.end) == _layers(assignment)

    async def _follow_orders(self) -> None:
        async for assignment in self._orders:
            self._changed.set()
            layers = f"{assignment.start}-{assignment.end - 1}"
            try:
                self.jobs.loaded = await self._loader.load(assignment)
                log(
                    logger,
                    logging.INFO,
                    "stage ready",
                    layers=layers,
                    kv_tokens=self.jobs.kv.tokens,
                    layer_us=self.jobs.loaded.layer_us,
                )
            except AzuError as error:
                self._note_failure(assignment, error.message)
                log(logger, logging.ERROR, "cannot load the assigned layers", layers=layers, reason=str(error))
            except Exception:  # a border: whatever a model makes transformers do, the next assignment may be better
                self._note_failure(assignment, "internal error")
                log(logger, logging.ERROR, "cannot load the assigned layers", layers=layers, exc_info=True)
            self._loading = None
            await self._note_cached()
            self._changed.set()

    def _note_failure(self, assignment: Assignment, reason: str) -> None:
        self._failed = (_layers(assignment), reason, time.monotonic() + _AFTER_FAILURE_S)

    async def _note_what_comes(self) -> None:
        """While files are being fetched, keep the record right about those that are here."""
        while True:
            await trio.sleep(_REFRESH_S)
            if self._loading is not None:
                await self._note_cached()

    async def _note_cached(self) -> None:
        self._cached = await trio.to_thread.run_sync(self._find_cached)

    def _find_cached(self) -> tuple[HeldRange, ...]:
        cached = ((digest, self._library.cached_range(manifest)) for digest, manifest in self._library.manifests())
        return tuple(
            HeldRange(manifest=digest, start=found[0], end=found[1], state="cached")
            for digest, found in cached
            if found
        )


def _layers(assignment: Assignment) -> tuple[str, int, int]:
    return assignment.manifest, assignment.start, assignment.end
