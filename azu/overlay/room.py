"""Who has to go so that a newcomer gets in, once a node has as many connections as it may. No I/O.

Nobody can fill a node for ever with connections that do nothing. Those of the subnet that holds most go first: many
from one subnet are what a flood looks like, and the gate makes an attacker bring an address for each few.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from libp2p.abc import INetConn
from libp2p.identity.identify import identify
from libp2p.identity.identify_push import identify_push
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction

from azu.overlay.gate import subnet_of

__all__ = ["IDLE_SECONDS", "Occupant", "Room", "least_useful", "origin_of"]

IDLE_SECONDS = 30.0  # a connection that was used more recently is not closed for a newcomer
# Streams that make no connection useful: those that have not agreed on a protocol, and identify's, which every
# connection begins with and a peer can leave unanswered.
_IDLE_PROTOCOLS = (None, identify.ID, identify_push.ID_PUSH)


@dataclass(frozen=True, slots=True)
class Occupant:
    """A live connection.

    origin: where it comes from (`origin_of`). idle: seconds since its last stream began or ended. is_busy: it has
    streams that somebody uses. is_inbound: the peer has dialled. is_kept: the peer is of use while it is idle, too.
    """

    origin: str
    idle: float
    is_busy: bool
    is_inbound: bool
    is_kept: bool


def least_useful(occupants: Sequence[Occupant], newcomer: str | None) -> int | None:
    """The index of the connection to be closed, or None: then the newcomer is turned away.

    It is an inbound one that nobody uses or keeps, of the origin that holds most of all connections, and there the one
    that has been idle for longest. A newcomer never takes the place of one whose origin holds fewer than its own, so
    that nobody who keeps many connections busy can drive others out.

    Args:
        newcomer: its origin; None where we dial it ourselves.
    """
    held = Counter(each.origin for each in occupants)
    fewest = 0 if newcomer is None else held[newcomer]
    candidates = [
        index
        for index, each in enumerate(occupants)
        if each.is_inbound
        and not each.is_busy
        and not each.is_kept
        and each.idle >= IDLE_SECONDS
        and held[each.origin] >= fewest
    ]
    return max(candidates, key=lambda index: (held[occupants[index].origin], occupants[index].idle), default=None)


def origin_of(muxed: Any) -> str:
    """Where a connection comes from: its subnet, as the gate counts. All that come through relays count as one."""
    remote = muxed.get_remote_address()
    return "a relay" if remote is None else subnet_of(remote[0])


class Room:
    """The places of a swarm.

    bound: connections in both directions, and is_kept: peers whose connections stay while they are idle; both are set
    by the owner. evicted: connections that had to go so far.
    """

    def __init__(self, clock: Callable[[], float], connections: Callable[[], Sequence[INetConn]]) -> None:
        self.bound = sys.maxsize
        self.is_kept: Callable[[ID], bool] = lambda peer_id: False
        self.evicted = 0
        self._clock = clock
        self._connections = connections
        self._leaving: WeakSet[INetConn] = WeakSet()  # those that have to go, and are not closed yet
        self._joining: WeakSet[Any] = WeakSet()  # muxers of those that are being added

    def is_left(self, newcomer: str | None) -> bool:
        """Whether one more may come, if need be in another's place. newcomer: as `least_useful` takes it."""
        staying = self._staying()
        return self._count(staying) < self.bound or self._victim(staying, newcomer) is not None

    def make(self, newcomer: str | None) -> Any:
        """Where `is_left`: the muxer of the connection that the caller has to close first, or None if there is room."""
        staying = self._staying()
        victim = None if self._count(staying) < self.bound else self._victim(staying, newcomer)
        if victim is None:
            return None
        self.evicted += 1
        self._leaving.add(victim)
        return victim.muxed_conn

    @contextmanager
    def taken(self, muxed: Any) -> Iterator[None]:
        """Count a newcomer while it is on its way to be among the connections."""
        self._joining.add(muxed)
        try:
            yield
        finally:
            self._joining.discard(muxed)

    def _count(self, staying: Sequence[INetConn]) -> int:
        return len({each.muxed_conn for each in staying}.union(self._joining))

    def _staying(self) -> list[INetConn]:
        return [each for each in self._connections() if not each.is_closed and each not in self._leaving]

    def _victim(self, connections: Sequence[INetConn], newcomer: str | None) -> INetConn | None:
        now = self._clock()
        index = least_useful([self._occupant(each, now) for each in connections], newcomer)
        return None if index is None else connections[index]

    def _occupant(self, connection: Any, now: float) -> Occupant:
        muxed = connection.muxed_conn
        return Occupant(
            origin_of(muxed),
            now - muxed.used_at,
            any(each.get_protocol() not in _IDLE_PROTOCOLS for each in connection.get_streams()),
            connection.direction == Direction.INBOUND,
            self.is_kept(muxed.peer_id),
        )
