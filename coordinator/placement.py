"""Keeping each published model covered: plan, sign assignments, hand them out, and again when something changed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import trio

from azu.channel import RefusedError
from azu.errors import AzuError
from azu.identity import Identity
from azu.logs import log
from azu.models.manifest import Manifest
from azu.planning import Placement, Range, links_of, place_in_steps, shape_of, uncovered, views_for
from azu.records import HeldRange, WorkerRecord
from azu.slices import in_slices
from azu.tickets import Assignment, sign_assignment
from azu.wire.tensors import WeightFormat
from coordinator.swarm import SwarmView

__all__ = [
    "Placer",
    "layers_text",
    "missing_layers",
    "with_spares_free",
]

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_ASSIGNMENT_LIFE_S = 60
# A worker that took an assignment is planned with as if it were loading until its record can say so.
_AFTER_ASSIGNMENT_S = 2 * _TICK_S
# A worker that refused or did not answer is given no assignment for this long.
_AFTER_REFUSAL_S = 15.0
# One that could not load a model gets others first for so long: what it cannot load at all must not keep it from those.
_AFTER_FAILURE_S = 600.0


def _is_anothers(worker: WorkerRecord, me: str) -> bool:
    """Whether another coordinator has given the worker its layers, which are left as they are then."""
    return worker.assigned_by not in ("", me)


def _active(worker: WorkerRecord) -> list[HeldRange]:
    """What a worker has in memory or is loading."""
    return [held for held in worker.ranges if held.state != "cached"]


def _without(retired: Collection[str], worker: WorkerRecord) -> WorkerRecord:
    """A worker's record without what it holds of models that nobody shall use any more."""
    if not any(held.manifest in retired for held in worker.ranges):
        return worker
    return worker.model_copy(update={"ranges": tuple(h for h in worker.ranges if h.manifest not in retired)})


def _loaded(worker: WorkerRecord) -> set[tuple[str, WeightFormat, int]]:
    """The layers of models that it could run now."""
    ranges = [held for held in worker.ranges if held.state == "loaded"]
    return {(held.manifest, worker.dtype, layer) for held in ranges for layer in range(held.start, held.end)}


def with_spares_free(workers: Sequence[WorkerRecord], me: str = "") -> list[WorkerRecord]:
    """The workers as if those that only repeat what others have loaded, and run no job, held nothing.

    Those that another coordinator than `me` has given their layers keep them.
    """
    loaded = {worker.peer_id: _loaded(worker) for worker in workers}
    holders = Counter(layer for layers in loaded.values() for layer in layers)
    freed: list[WorkerRecord] = []
    for worker in sorted(workers, key=lambda worker: (len(loaded[worker.peer_id]), worker.peer_id)):
        layers = loaded[worker.peer_id]
        is_spare = bool(layers) and not worker.jobs and all(holders[layer] > 1 for layer in layers)
        if is_spare and not _is_anothers(worker, me):
            holders.subtract(layers)
            worker = _without({manifest for manifest, *_ in layers}, worker)
        freed.append(worker)
    return freed


def missing_layers(manifest: Manifest, workers: Iterable[WorkerRecord]) -> tuple[tuple[int, int], ...]:
    """The [start, end) stretches of a model's layers for which no job can be routed now.

    Stages of one job share a dtype, so workers of different ones do not complete each other.
    """
    workers = list(workers)
    by_dtype = [[w for w in workers if w.dtype == dtype] for dtype in sorted({w.dtype for w in workers})]
    missing = [uncovered(manifest.n_layers, views_for(manifest, alike)) for alike in by_dtype]
    return min(missing, key=_length, default=((0, manifest.n_layers),))


def _is_missing(manifest: Manifest, workers: Iterable[WorkerRecord]) -> bool:
    """Whether layers will be missing even once all that is being loaded is ready."""

    def ready(held: HeldRange) -> HeldRange:
        return held.model_copy(update={"state": "loaded"}) if held.state == "loading" else held

    return bool(
        missing_layers(manifest, [w.model_copy(update={"ranges": tuple(map(ready, w.ranges))}) for w in workers])
    )


def layers_text(ranges: Iterable[tuple[int, int]]) -> str:
    """Stretches [start, end) of layers as people write them: "0-9, 20"."""
    return ", ".join(f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in ranges)


def _length(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


class Placer:
    """Gives out assignments. `run()` owns its tasks.

    Args:
        manifests: the models to cover; asked for in each round.
        retired: digests of models that are not covered any more: a worker that has one loaded may be given others.
        cuts: the stages of running jobs, by a model's digest.
    """

    def __init__(
        self,
        identity: Identity,
        swarm: SwarmView,
        manifests: Callable[[], Sequence[Manifest]],
        *,
        kv_tokens: int,
        retired: Callable[[], Collection[str]] = frozenset,
        cuts: Callable[[str], Sequence[Range]] = lambda _: (),
    ) -> None:
        self._identity = identity
        self._swarm = swarm
        self._manifests = manifests
        self._retired = retired
        self._cuts = cuts
        self._kv_tokens = kv_tokens
        self._sequence = 0
        self._assigned: dict[str, tuple[HeldRange, float]] = {}  # what was taken, and until when that is news
        self._left_out: dict[str, float] = {}  # by peer id: until when
        self._unable: dict[tuple[str, str], float] = {}  # by peer id and manifest: until when
        self._reported: dict[str, tuple[tuple[int, int], ...]] = {}  # by manifest: the missing layers last logged

    async def run(self) -> None:
        """Plan every second until cancelled."""
        while True:
            await self._tick()
            await trio.sleep(_TICK_S)

    async def _tick(self) -> None:
        """One round: holes are filled by idle workers, and where these do not suffice, by replicas of other models."""
        now = trio.current_time()
        self._assigned = {peer: held for peer, held in self._assigned.items() if now < held[1]}
        self._left_out = {peer: until for peer, until in self._left_out.items() if now < until}
        self._unable = {pair: until for pair, until in self._unable.items() if now < until}
        manifests, retired = self._manifests(), self._retired()
        me = self._identity.peer_id
        workers = [
            self._as_assigned(worker if _is_anothers(worker, me) else _without(retired, worker))
            for worker in self._swarm.workers()
        ]
        for manifest in manifests:
            self._report(manifest, missing_layers(manifest, workers), len(workers))
        # Who refuses to change what it holds still holds it: leaving it out would tear a hole to be filled.
        workers = [w for w in workers if w.peer_id not in self._left_out or _active(w)]
        async with trio.open_nursery() as nursery:
            again: list[Manifest] = []
            for manifest in manifests:
                able = [w for w in workers if (w.peer_id, manifest.digest) not in self._unable or _active(w)]
                placed = await self._cover(nursery, manifest, able)
                if not placed and len(able) < len(workers):
                    again.append(manifest)
                workers = [worker for worker in workers if worker.peer_id not in placed]
            for manifest in again:  # whoever is left may try once more what it could not load
                placed = await self._cover(nursery, manifest, workers)
                workers = [worker for worker in workers if worker.peer_id not in placed]

    async def _cover(self, nursery: trio.Nursery, manifest: Manifest, workers: Sequence[WorkerRecord]) -> set[str]:
        """Fill a model's holes; who got something."""
        placed = await self._place(nursery, manifest, workers)
        if not placed and _is_missing(manifest, workers):
            placed = await self._place(nursery, manifest, with_spares_free(workers, self._identity.peer_id))
        return placed

    async def _place(self, nursery: trio.Nursery, manifest: Manifest, workers: Sequence[WorkerRecord]) -> set[str]:
        """Plan for one model and hand out what follows; who got something."""
        placed: set[str] = set()
        for dtype in sorted({worker.dtype for worker in workers}):
            alike = [worker for worker in workers if worker.dtype == dtype]
            shape, links = shape_of(manifest, dtype, self._kv_tokens), links_of(manifest, dtype, alike)
            views = views_for(manifest, alike, is_fixed=partial(_is_anothers, me=self._identity.peer_id))
            plan = place_in_steps(shape, views, links, cuts=self._cuts(manifest.digest))
            for placement in await in_slices(plan):
                placed.add(placement.peer_id)
                if placement.peer_id not in self._left_out:
                    nursery.start_soon(self._assign, manifest, dtype, placement)
        return placed

    def _report(self, manifest: Manifest, missing: tuple[tuple[int, int], ...], workers: int) -> None:
        """Log which layers are missing, when that changes."""
        if self._reported.get(manifest.digest, ()) == missing:
            return
        self._reported[manifest.digest] = missing
        tell = partial(log, logger, model=manifest.model_id, workers=workers)
        if missing:
            tell(logging.WARNING, "model not covered", missing_layers=layers_text(missing))
        else:
            tell(logging.INFO, "model covered")

    def _as_assigned(self, worker: WorkerRecord) -> WorkerRecord:
        """A worker's record with the assignment that it took since."""
        if worker.peer_id not in self._assigned:
            return worker
        cached = tuple(held for held in worker.ranges if held.state == "cached")
        return worker.model_copy(update={"ranges": (*cached, self._assigned[worker.peer_id][0])})

    async def _assign(self, manifest: Manifest, dtype: WeightFormat, placement: Placement) -> None:
        now = time.time()
        self._sequence = max(self._sequence + 1, int(now * 1000))
        assignment = Assignment.model_validate(
            {
                "worker": placement.peer_id,
                "coordinator": self._identity.peer_id,
                "manifest": manifest.digest,
                "start": placement.start,
                "end": placement.end,
                "dtype": dtype,
                "kv_tokens": self._kv_tokens,
                "sequence": self._sequence,
                "expires_at": int(now) + _ASSIGNMENT_LIFE_S,
            }
        )
        tell = partial(log, logger, peer=placement.peer_id, layers=f"{placement.start}-{placement.end - 1}")
        try:
            await self._swarm.assign(placement.peer_id, sign_assignment(self._identity, assignment))
            held = HeldRange(manifest=manifest.digest, start=placement.start, end=placement.end, state="loading")
            self._assigned[placement.peer_id] = held, trio.current_time() + _AFTER_ASSIGNMENT_S
            tell(logging.INFO, "layers assigned", model=manifest.model_id)
        except (AzuError, trio.TooSlowError) as error:
            self._left_out[placement.peer_id] = trio.current_time() + _AFTER_REFUSAL_S
            if isinstance(error, RefusedError) and error.code == "load_failed":
                self._unable[placement.peer_id, manifest.digest] = trio.current_time() + _AFTER_FAILURE_S
            level = logging.INFO if isinstance(error, RefusedError) else logging.WARNING
            tell(level, "assignment not taken", reason=str(error) or "no answer")
