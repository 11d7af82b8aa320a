"""Find every worker and coordinator of a swarm: who announced itself, what its record says, how far away it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

import trio

from azu.config import DhtSettings
from azu.dht.kinds import COORDINATOR, WORKER, Kind, standing
from azu.dht.snapshot import Pong, Seen, Snapshot
from azu.dht.visit import visit
from azu.errors import AzuError, InputError
from azu.overlay import Overlay, parse_peer_multiaddr
from azu.records import CoordinatorRecord, Record

__all__ = ["LOOKUP_SECONDS", "coordinators", "dialable", "look", "ping", "ping_all", "survey"]

PARALLEL_LOOKUPS = 16  # records asked for at once; each asks up to ten peers
PARALLEL_PINGS = 64  # connections being made at once
LOOKUP_SECONDS = 10.0  # one record, where nobody has it and some peers are slow
PING_SECONDS = 3.0  # one peer, dialling included, which may take a relay
ALL_PINGS_SECONDS = 6.0
MAX_PEERS = 2_000  # of one kind; what a hostile DHT server can make us look for
MAX_CLOCKS = 16  # peers whose clocks are compared with ours

R = TypeVar("R", bound=Record, covariant=True)


async def survey(settings: DhtSettings, *, with_rtt: bool) -> Snapshot:
    """Join, look round, and leave.

    Raises:
        InputError: no address, or a malformed one. NetworkError: nobody answers.
    """
    async with visit(settings) as overlay:
        return await look(overlay, with_rtt=with_rtt)


async def look(overlay: Overlay, *, with_rtt: bool) -> Snapshot:
    """Find every worker and coordinator and read their records; `with_rtt` pings those that are live."""
    limit = trio.CapacityLimiter(PARALLEL_LOOKUPS)
    searches = _Search(overlay, limit, WORKER), _Search(overlay, limit, COORDINATOR)
    workers, coordinators = searches
    async with trio.open_nursery() as nursery:
        for search in searches:
            nursery.start_soon(search.run)
    now = time.time()
    live = [*workers.live(now), *coordinators.live(now)]
    stale = [each for each in (*workers.records, *coordinators.records) if standing(each, now) != "live"]
    pongs = await ping_all(overlay, live) if with_rtt else {}
    return Snapshot(
        taken_at=now,
        workers=tuple(Seen(each, pongs.get(each.peer_id)) for each in workers.live(now)),
        coordinators=tuple(Seen(each, pongs.get(each.peer_id)) for each in coordinators.live(now)),
        expired=sum(standing(each, now) == "expired" for each in stale),
        early=sum(standing(each, now) == "early" for each in stale),
        silent=workers.silent + coordinators.silent,
        clock_ahead=None if live else await _clock_ahead(overlay, stale[:MAX_CLOCKS]),
    )


async def coordinators(overlay: Overlay) -> list[CoordinatorRecord]:
    """Only the live coordinators' records, which say what the models are called."""
    search = _Search(overlay, trio.CapacityLimiter(PARALLEL_LOOKUPS), COORDINATOR)
    await search.run()
    return search.live(time.time())


async def _clock_ahead(overlay: Overlay, stale: Sequence[Record]) -> float | None:
    """What the clocks differ by, seen from peers that renew their records all the time, and out of force here."""
    answered = await ping_all(overlay, stale)
    now = time.time()
    ahead = [now - record.issued_at for record in stale if record.peer_id in answered]
    return statistics.median(ahead) if ahead else None


class _Search(Generic[R]):
    """The peers that announced one kind's key, and the records that they keep in the DHT."""

    def __init__(self, overlay: Overlay, limit: trio.CapacityLimiter, kind: Kind[R]) -> None:
        self.records: list[R] = []
        self.silent = 0
        self._overlay = overlay
        self._limit = limit
        self._kind = kind

    async def run(self) -> None:
        peers = await self._overlay.providers(self._kind.meeting_key, all_holders=True)
        async with trio.open_nursery() as nursery:
            for peer_id in peers[:MAX_PEERS]:
                nursery.start_soon(self._look_up, peer_id)

    def live(self, now: float) -> list[R]:
        return [record for record in self.records if standing(record, now) == "live"]

    async def _look_up(self, peer_id: str) -> None:
        try:
            async with self._limit:
                value = await self._overlay.get_record(self._kind.key(peer_id), timeout=LOOKUP_SECONDS)
            record = None if value is None else self._kind.read(value)
        except AzuError:  # one peer's trouble; the table says how many have none
            record = None
        if record is not None:
            self.records.append(record)
        else:
            self.silent += 1


def dialable(record: Record) -> tuple[str, ...]:
    """Those of a record's addresses that are addresses of its peer; it may say anything there."""
    return tuple(address for address in record.addrs if _leads_to(address, record.peer_id))


def _leads_to(address: str, peer_id: str) -> bool:
    try:
        return parse_peer_multiaddr(address).peer_id == peer_id
    except InputError:
        return False


async def ping_all(overlay: Overlay, records: Iterable[Record]) -> Mapping[str, Pong]:
    """The answers by peer id, of those that answer in time."""
    pongs: dict[str, Pong] = {}
    limit = trio.CapacityLimiter(PARALLEL_PINGS)
    with trio.move_on_after(ALL_PINGS_SECONDS):
        async with trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(partial(_ping, overlay, record, limit, pongs))
    return pongs


async def _ping(overlay: Overlay, record: Record, limit: trio.CapacityLimiter, pongs: dict[str, Pong]) -> None:
    addrs = dialable(record)
    async with limit:
        with trio.move_on_after(PING_SECONDS):
            try:
                if addrs or overlay.is_connected(record.peer_id):
                    await overlay.connect(record.peer_id, addrs)
                    pongs[record.peer_id] = await ping(overlay, record.peer_id)
            except AzuError:
                return  # unreachable


async def ping(overlay: Overlay, peer_id: str) -> Pong:
    """One round trip to a peer that there is a connection to, over the best one.

    Raises:
        NetworkError: no answer.
    """
    rtt = await overlay.ping(peer_id)
    return Pong(rtt, "direct" if overlay.is_direct(peer_id) else "relayed")
