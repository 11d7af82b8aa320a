"""What peers have sent that nobody has read yet: bounded for each of them, and for all together.

Yamux gives each stream a window of 256 KiB from the start, so a peer with 256 streams may make us keep 64 MiB, and a
thousand peers 64 GiB, without breaking a rule. So what really lies there is looked at, each time that so much has come
that it can matter. An honest peer stays below: what we read late is the exception, and window beyond the first 256 KiB
is granted within a bound of its own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol
from weakref import WeakSet

__all__ = ["Held"]

PEER_BYTES = 64 * 1024 * 1024  # of one peer, on all its connections
ALL_BYTES = 512 * 1024 * 1024  # of all peers
CHECK_BYTES = 8 * 1024 * 1024  # that come between two looks


class Holder(Protocol):
    """A connection."""

    @property
    def peer_id(self) -> object:
        """Whose it is."""

    @property
    def unread(self) -> int:
        """Bytes that came and are held until somebody reads them."""

    def cut_off(self, why: str) -> None:
        """Drop what is unread, and close."""


class Held:
    """Looks over all connections of a node. Its connections need not be taken out again."""

    def __init__(self) -> None:
        self._connections: WeakSet[Holder] = WeakSet()
        self._came = 0

    def watch(self, connection: Holder) -> None:
        """Count a connection's unread bytes from now on."""
        self._connections.add(connection)

    def came(self, size: int) -> None:
        """Note that bytes came; from time to time, cut off the peers that hold too much."""
        self._came += size
        if self._came >= CHECK_BYTES:
            self._came = 0
            self._check()

    def _check(self) -> None:
        unread: defaultdict[str, int] = defaultdict(int)
        for each in self._connections:
            unread[str(each.peer_id)] += each.unread
        total = sum(unread.values())
        for peer_id in sorted(unread, key=unread.__getitem__, reverse=True):
            if unread[peer_id] <= PEER_BYTES and total <= ALL_BYTES:
                return
            total -= unread[peer_id]
            for each in self._connections:
                if str(each.peer_id) == peer_id:
                    each.cut_off(f"its peer sent {unread[peer_id]} bytes that nobody reads")
