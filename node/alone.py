"""A worker whose coordinators are silent: it takes the layers that a model lacks most, by the coordinators' own rule.

**When.** For `_ALONE_S` none of the coordinators that it serves has asked for its state or given it layers. Those are
the ones that its owner named, or the first that it followed since it was started. One that serves nobody yet waits.

**What.** Only models whose manifest one of them signed. Workers' records come from the DHT, and the plan for a model is
the one that a coordinator would make of them (`azu.planning.place`): of that it carries out its own part. So it moves
only where the gain clearly exceeds the cost, and rests for `_REST_S` then. Where it has no layers and no part, and some
are missing all the same, it takes as many of the largest hole's as fit: others that could, may not act.

**Not all at once.** It looks, waits for a time drawn by chance, looks again, and acts only if it would still do the
same: what another has begun to load is in that one's record.

A coordinator that comes back finds layers where its own plan leaves them, and has nothing to assign.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from random import SystemRandom
from typing import NamedTuple

import trio

from azu.config import KV_TOKENS
from azu.distribution import Library, fetch_manifest, open_manifest
from azu.errors import AzuError, NetworkError
from azu.logs import log
from azu.models.manifest import Manifest
from azu.overlay import Overlay
from azu.planning import ModelShape, Range, holes, links_of, place_in_steps, shape_of, views_for
from azu.planning.steps import Steps, finish
from azu.records import WORKERS_KEY, WorkerRecord, is_live, open_worker_record, worker_key
from azu.slices import in_slices
from azu.tickets import Assignment, Refusal
from node.trust import Trust

__all__ = ["Alone", "choose"]

logger = logging.getLogger(__name__)

_CHANCE = SystemRandom()

# A coordinator asks every worker each second, and in a swarm of thousands once or twice a minute.
_ALONE_S = 120.0
_LOOK_S = 20.0  # between two looks, and up to twice as long
_CHANCE_S = 20.0
_REST_S = 900.0
_TAKES_S = 60  # an order to oneself is carried out at once
# Anybody can say anything in the DHT: so much of it is looked at.
_MOST_WORKERS, _AT_ONCE = 512, 8
_MOST_MODELS, _MOST_ASKED = 16, 4
_FORGET_S = 600.0


class Wish(NamedTuple):
    """Layers [start, end) of a model, with room for so many positions of KV cache."""

    manifest: str
    start: int
    end: int
    kv_tokens: int


_Part = tuple[bool, int, Wish | None]  # how little a model needs a worker, and the worker's part in its plan


class Alone:
    """Of one worker. `run()` acts; `heard()` keeps it from that.

    Args:
        me: the worker's record as of now.
        take: carries an assignment out, or says why not.
    """

    def __init__(
        self,
        overlay: Overlay,
        library: Library,
        trust: Trust,
        me: Callable[[], WorkerRecord],
        take: Callable[[Assignment], Refusal | None],
    ) -> None:
        self._overlay = overlay
        self._library = library
        self._trust = trust
        self._me = me
        self._take = take
        self._heard_at = self._rests_until = float("-inf")
        self._unknown: dict[str, float] = {}  # manifests that nobody could send signed by whom we serve: until when

    def heard(self, peer_id: str) -> None:
        """A peer asked for the worker's state, or assigned layers."""
        if self._trust.serves(peer_id):
            self._heard_at = trio.current_time()

    async def run(self) -> None:
        """Look after itself while nobody does, until cancelled."""
        self._heard_at = trio.current_time()
        while True:
            await trio.sleep(_LOOK_S * _CHANCE.uniform(1, 2))
            if not self._is_alone() or (wish := await self._look()) is None:
                continue
            await trio.sleep(_CHANCE.uniform(0, _CHANCE_S))
            if self._is_alone() and await self._look() == wish:
                await self._follow(wish)

    def _is_alone(self) -> bool:
        return trio.current_time() - self._heard_at >= _ALONE_S

    async def _look(self) -> Wish | None:
        me = self._me()
        is_idle = all(held.state == "cached" for held in me.ranges)
        if me.jobs or (not is_idle and trio.current_time() < self._rests_until):
            return None
        records = [record for record in await self._records() if record.peer_id != me.peer_id]
        return await in_slices(choose_in_steps(await self._models(records), records, me))

    async def _records(self) -> list[WorkerRecord]:
        """The live records of workers that the DHT knows."""
        found: list[WorkerRecord] = []
        limit = trio.CapacityLimiter(_AT_ONCE)

        async def ask(peer_id: str) -> None:
            async with limit:
                try:
                    value = await self._overlay.get_record(worker_key(peer_id))
                    record = open_worker_record(value) if value is not None else None
                except AzuError as error:
                    log(logger, logging.DEBUG, "a worker's record was not found", peer=peer_id, reason=error.message)
                    return
            if record is not None and is_live(record, time.time()):
                found.append(record)

        try:
            peers = await self._overlay.providers(WORKERS_KEY, all_holders=True)
        except NetworkError as error:
            log(logger, logging.DEBUG, "workers not looked up", reason=error.message)
            return []
        async with trio.open_nursery() as nursery:
            for peer_id in peers[:_MOST_WORKERS]:
                nursery.start_soon(ask, peer_id)
        return found

    async def _models(self, records: Sequence[WorkerRecord]) -> dict[str, Manifest]:
        """By digest, the models of whom we serve: those whose manifest we have, and those that workers hold most."""
        kept = await trio.to_thread.run_sync(self._kept)
        held = Counter(held.manifest for record in records for held in record.ranges if held.manifest not in kept)
        now = trio.current_time()
        self._unknown = {digest: until for digest, until in self._unknown.items() if now < until}

        async def ask(digest: str) -> None:
            holders = [r.peer_id for r in records if any(each.manifest == digest for each in r.ranges)][:_MOST_ASKED]
            fetch = partial(fetch_manifest, self._overlay, holders, digest, is_trusted=self._trust.serves)
            try:
                envelope, kept[digest] = await fetch()
                await trio.to_thread.run_sync(self._library.keep, digest, envelope)
            except NetworkError as error:
                self._unknown[digest] = now + _FORGET_S
                log(logger, logging.DEBUG, "a model of nobody that this worker serves", reason=error.message)

        async with trio.open_nursery() as nursery:
            for digest, _ in held.most_common(_MOST_MODELS):
                if digest not in self._unknown:
                    nursery.start_soon(ask, digest)
        return kept

    def _kept(self) -> dict[str, Manifest]:
        return {
            digest: manifest
            for digest, manifest in self._library.manifests()
            if (publisher := self._publisher(digest)) is not None and self._trust.serves(publisher)
        }

    def _publisher(self, digest: str) -> str | None:
        envelope = self._library.envelope(digest)
        return open_manifest(envelope, digest)[0] if envelope is not None else None

    async def _follow(self, wish: Wish) -> None:
        me = self._me()
        publisher = await trio.to_thread.run_sync(self._publisher, wish.manifest)
        now = time.time()
        order = Assignment.model_validate(
            {
                "worker": me.peer_id,
                "coordinator": publisher,  # whom files are asked of first, should it be back
                **wish._asdict(),
                "dtype": me.dtype,
                "sequence": int(now * 1000),
                "expires_at": int(now) + _TAKES_S,
            }
        )
        tell = {"layers": f"{wish.start}-{wish.end - 1}", "manifest": wish.manifest[:12]}
        if (refusal := self._take(order)) is not None:
            log(logger, logging.DEBUG, "layers not taken", reason=refusal.message, **tell)
            return
        self._rests_until = trio.current_time() + _REST_S
        log(logger, logging.INFO, "no coordinator is heard: taking the layers that are needed most", **tell)


def choose(models: Mapping[str, Manifest], records: Sequence[WorkerRecord], me: WorkerRecord) -> Wish | None:
    """What a worker should load that decides for itself, or None. Pure.

    Args:
        models: those it may serve, by digest; where it holds one, it stays with that.
        records: of all other workers.
    """
    return finish(choose_in_steps(models, records, me))


def choose_in_steps(
    models: Mapping[str, Manifest], records: Sequence[WorkerRecord], me: WorkerRecord
) -> Steps[Wish | None]:
    """As `choose`, a little at a time."""
    mine = {held.manifest for held in me.ranges if held.state != "cached"}
    alike = [*(record for record in records if record.dtype == me.dtype and not record.leaving), me]
    parts: list[_Part] = []
    for digest, manifest in models.items():
        part = (yield from _part(manifest, alike, me)) if mine <= {digest} else None
        parts += [part] if part is not None else []
    return min(parts, default=(0, 0, None))[-1]


def _part(manifest: Manifest, workers: Sequence[WorkerRecord], me: WorkerRecord) -> Steps[_Part | None]:
    """A worker's part in a model's plan. Before it how little the model needs that, to compare it with others: whether
    it is whole, and how many workers hold layers of it.
    """
    kv_tokens = min([KV_TOKENS, *(w.kv_tokens for w in workers if w.range_in("loaded", manifest.digest))])
    shape = shape_of(manifest, me.dtype, max(1, kv_tokens))
    views = views_for(manifest, workers)
    mine = next(view for view in views if view.peer_id == me.peer_id)
    held = [view.held for view in views if view.held]
    missing = holes(manifest.n_layers, held)
    plan = yield from place_in_steps(shape, views, links_of(manifest, me.dtype, workers))
    own = next(((p.start, p.end) for p in plan if p.peer_id == me.peer_id), None)
    if own is None and mine.held is None:
        own = _most_of(shape, mine.vram, missing)
    return (not missing, len(held), Wish(manifest.digest, *own, max(1, kv_tokens))) if own is not None else None


def _most_of(shape: ModelShape, vram: int, missing: Iterable[Range]) -> Range | None:
    """As many layers of the largest hole as fit, from its start or, where more fit so, to its end."""
    for start, end in sorted(missing, key=lambda hole: (hole[0] - hole[1], hole)):
        for count in range(end - start, 0, -1):
            for part in ((start, start + count), (end - count, end)):
                if shape.stage_bytes(*part) <= vram:
                    return part
    return None
