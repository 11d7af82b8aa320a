"""Look into a swarm's DHT as a client that listens nowhere and leaves nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

import trio

from azu.dht.snapshot import Seen, Snapshot
from azu.errors import AzuError, InputError, NetworkError
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import (
    COORDINATORS_KEY,
    VALIDATORS,
    WORKERS_KEY,
    Record,
    coordinator_key,
    is_live,
    open_coordinator_record,
    open_worker_record,
    worker_key,
)

__all__ = ["AGENT", "look", "survey"]

AGENT = "azu-dht/0.1.0"
PARALLEL_LOOKUPS = 16  # records asked for at once; each asks up to ten peers
PARALLEL_PINGS = 64  # connections being made at once
SETTLE_SECONDS = 2.0  # for meeting the neighbours, from the first connection on
LOOKUP_SECONDS = 10.0  # one record, where nobody has it and some peers are slow
PING_SECONDS = 2.0  # one peer, dialling included
ALL_PINGS_SECONDS = 6.0
_POLL_SECONDS = 0.02
MAX_PEERS = 2_000  # of one kind; what a hostile DHT server can make us look for

R = TypeVar("R", bound=Record)


async def survey(bootstrap: Sequence[str], *, with_rtt: bool, swarm_key: bytes | None = None) -> Snapshot:
    """Join through `bootstrap`, look round, and leave.

    Raises:
        InputError: no address, or a malformed one. NetworkError: nobody answers.
    """
    if not bootstrap:
        raise InputError(
            "no bootstrap address was given",
            code="no_bootstrap",
            remedy="Add --bootstrap MULTIADDR with an address that `azu-bootstrap run` prints, or set AZU_BOOTSTRAP",
        )
    config = OverlayConfig(
        os.urandom(32), listen=(), server=False, agent=AGENT, validators=VALIDATORS, swarm_key=swarm_key
    )
    async with open_overlay(config) as overlay:
        reached = await _join(overlay, bootstrap)
        snapshot = await look(overlay, with_rtt=with_rtt)
        if snapshot.is_empty and not overlay.statistics().routing_table:
            raise NetworkError(
                f"{', '.join(reached)} answers, but serves no DHT",
                code="no_dht",
                remedy="Give the address of a bootstrap node, as `azu-bootstrap run` prints it",
            )
        return snapshot


async def _join(overlay: Overlay, bootstrap: Sequence[str]) -> Sequence[str]:
    """Join, and wait no longer for slow peers once somebody has let us in: we stay for seconds only."""
    failed: list[AzuError] = []

    async def hurry() -> None:
        while not overlay.connected_peers():  # noqa: ASYNC110 - the overlay has no event for it
            await trio.sleep(_POLL_SECONDS)
        scope.deadline = trio.current_time() + SETTLE_SECONDS

    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        nursery.start_soon(hurry)
        try:
            await overlay.bootstrap(bootstrap)
        except AzuError as error:  # carried out of the nursery, which would wrap it in a group
            failed.append(error)
        scope.cancel()
    if failed:
        raise failed[0]
    return overlay.connected_peers()


async def look(overlay: Overlay, *, with_rtt: bool) -> Snapshot:
    """Find every worker and coordinator and read their records; `with_rtt` pings those that are live."""
    limit = trio.CapacityLimiter(PARALLEL_LOOKUPS)
    workers = _Search(overlay, limit, WORKERS_KEY, worker_key, open_worker_record)
    coordinators = _Search(overlay, limit, COORDINATORS_KEY, coordinator_key, open_coordinator_record)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        nursery.start_soon(coordinators.run)
    now = time.time()
    live = [*workers.live(now), *coordinators.live(now)]
    rtts = await _ping_all(overlay, live) if with_rtt else {}
    return Snapshot(
        taken_at=now,
        workers=tuple(Seen(each, rtts.get(each.peer_id)) for each in workers.live(now)),
        coordinators=tuple(Seen(each, rtts.get(each.peer_id)) for each in coordinators.live(now)),
        expired=len(workers.records) + len(coordinators.records) - len(live),
        silent=workers.silent + coordinators.silent,
    )


class _Search(Generic[R]):
    """The peers that announced one key, and the records that they keep in the DHT."""

    def __init__(
        self,
        overlay: Overlay,
        limit: trio.CapacityLimiter,
        key: bytes,
        place: Callable[[str], str],
        read: Callable[[bytes], R],
    ) -> None:
        self.records: list[R] = []
        self.silent = 0
        self._overlay = overlay
        self._limit = limit
        self._key = key
        self._place = place
        self._read = read

    async def run(self) -> None:
        peers = await self._overlay.providers(self._key)
        async with trio.open_nursery() as nursery:
            for peer_id in peers[:MAX_PEERS]:
                nursery.start_soon(self._look_up, peer_id)

    def live(self, now: float) -> list[R]:
        return [record for record in self.records if is_live(record, now)]

    async def _look_up(self, peer_id: str) -> None:
        try:
            async with self._limit:
                value = await self._overlay.get_record(self._place(peer_id), timeout=LOOKUP_SECONDS)
            record = None if value is None else self._read(value)
        except AzuError:  # one peer's trouble; the table says how many have none
            record = None
        if record is not None:
            self.records.append(record)
        else:
            self.silent += 1


async def _ping_all(overlay: Overlay, records: Sequence[Record]) -> Mapping[str, float]:
    """Round-trip times by peer id, of those that answer in time."""
    rtts: dict[str, float] = {}
    limit = trio.CapacityLimiter(PARALLEL_PINGS)
    addrs = {record.peer_id: record.addrs for record in records}
    with trio.move_on_after(ALL_PINGS_SECONDS):
        async with trio.open_nursery() as nursery:
            for peer_id in addrs:
                nursery.start_soon(partial(_ping, overlay, peer_id, addrs[peer_id], limit, rtts))
    return rtts


async def _ping(
    overlay: Overlay, peer_id: str, addrs: Sequence[str], limit: trio.CapacityLimiter, rtts: dict[str, float]
) -> None:
    async with limit:
        with trio.move_on_after(PING_SECONDS):
            try:
                await overlay.connect(peer_id, addrs)
                rtts[peer_id] = await overlay.ping(peer_id)
            except AzuError:
                return  # unreachable, or its record has addresses that are none
