"""How far other peers are, as measured: round trips by pings, and bandwidth by the ring's large messages.

`Links` is pure and holds MAX_LINKS peers at most: a new one takes the place of the one that was measured longest ago,
and neighbours in a ring stay before all others. What has not been measured for ten minutes is not told any more. The
neighbours in a running job's ring are pinged every few seconds: where their line becomes slow, the job may leave it
(`coordinator/hedging.py`). A round trip counts as the shortest of the last three, the first of which follow each other
soon: one that took long tells of a busy machine, not of a line.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from azu.errors import NetworkError
from azu.logs import log
from azu.overlay import Overlay
from azu.records import MAX_LINKS, Link
from azu.wire.messages import RING_PROTOCOL

__all__ = ["Links", "keep_pinging"]

logger = logging.getLogger(__name__)

_LIFE_S = 600.0
_PING_S = 60.0  # between two pings of one peer, ...
_SOON_S = 3.0  # ... that is new, or a neighbour that a ring has used within _RING_S
_RING_S = 10.0
_ROUND_S, _ROUND_NEIGHBOURS, _ROUND_OTHERS = 3.0, 4, 2  # so many are pinged at once, and then none for so long
_PINGS = 3  # of which the shortest counts
_SMOOTH = 0.3  # weight of a new measurement of bandwidth
# A frame of this size does not vanish in the system's buffers: the time to send it is the line's.
_LARGE_BYTES = 256 << 10
_LEAST_S, _LONGEST_S = 1e-6, 1e3  # clocks may jump; a record has to hold what was measured
_NEVER = float("-inf")


@dataclass(slots=True)
class _Peer:
    rtts: deque[float] = field(default_factory=lambda: deque(maxlen=_PINGS))  # seconds
    bytes_per_s: float = 0.0
    is_relayed: bool = False
    measured_at: float = _NEVER
    pinged_at: float = _NEVER  # or tried to
    used_at: float = _NEVER  # by a ring

    @property
    def rtt_s(self) -> float:
        return min(self.rtts, default=0.0)

    @property
    def is_new(self) -> bool:
        return 0 < len(self.rtts) < _PINGS


class Links:
    """Those of one worker. `now`: seconds of one steady clock."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}

    @property
    def peers(self) -> tuple[str, ...]:
        """Those that were measured or used."""
        return tuple(self._peers)

    def note_ping(self, peer_id: str, rtt_s: float | None, *, is_relayed: bool, now: float) -> None:
        """A ping's answer came after `rtt_s`; None where there was none."""
        peer = self._peer(peer_id)
        peer.pinged_at = now
        if rtt_s is not None:
            if peer.is_relayed != is_relayed:
                peer.rtts.clear()  # another way, so another time
            peer.rtts.append(rtt_s)
            peer.is_relayed, peer.measured_at = is_relayed, now
        self._drop()

    def note_sent(self, peer_id: str, size: int, seconds: float, *, is_relayed: bool, now: float) -> None:
        """The system took a message with a body of `size` bytes for a peer of a ring within so many seconds."""
        peer = self._peer(peer_id)
        peer.used_at = now
        if size >= _LARGE_BYTES:
            rate = size / max(seconds, _LEAST_S)
            if peer.is_relayed != is_relayed:
                peer.bytes_per_s = 0.0
            peer.bytes_per_s += (rate - peer.bytes_per_s) * (_SMOOTH if peer.bytes_per_s else 1.0)
            peer.is_relayed, peer.measured_at = is_relayed, now
        self._drop()

    def note_heard(self, peer_id: str, now: float) -> None:
        """A message of a ring came from a peer."""
        self._peer(peer_id).used_at = now
        self._drop()

    def due(self, connected: Iterable[str], now: float) -> list[str]:
        """The connected peers to be pinged now, neighbours in running rings first, and each before those that waited
        less.
        """
        known = {peer_id: self._peers.get(peer_id, _Peer()) for peer_id in connected}
        near = {peer_id for peer_id, peer in known.items() if now - peer.used_at < _RING_S}
        order = sorted(known, key=lambda peer_id: known[peer_id].pinged_at)
        waits = {peer_id: now - known[peer_id].pinged_at for peer_id in order}
        soon = near | {peer_id for peer_id, peer in known.items() if peer.is_new}
        due = [peer_id for peer_id in order if waits[peer_id] >= (_SOON_S if peer_id in soon else _PING_S)]
        neighbours = [peer_id for peer_id in due if peer_id in near]
        others = [peer_id for peer_id in due if peer_id not in near]
        return neighbours[:_ROUND_NEIGHBOURS] + others[:_ROUND_OTHERS]

    def told(self, now: float) -> tuple[Link, ...]:
        """What a record says of them."""
        return tuple(
            Link(
                peer_id=peer_id,
                rtt_us=round(min(peer.rtt_s, _LONGEST_S) * 1e6),
                bytes_per_s=round(peer.bytes_per_s),
                relayed=peer.is_relayed,
            )
            for peer_id, peer in self._peers.items()
            if now - peer.measured_at < _LIFE_S
        )

    def _peer(self, peer_id: str) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:  # nothing is made for a message of a ring that runs
            peer = self._peers[peer_id] = _Peer()
        return peer

    def _drop(self) -> None:
        if len(self._peers) > MAX_LINKS:
            ages = {
                peer_id: (peer.used_at, max(peer.measured_at, peer.pinged_at)) for peer_id, peer in self._peers.items()
            }
            del self._peers[min(ages, key=ages.__getitem__)]


async def keep_pinging(overlay: Overlay, links: Links) -> None:
    """Ping connected workers in turn until cancelled."""

    async def ping(peer_id: str) -> None:
        rtt: float | None = None
        try:
            rtt = await overlay.ping(peer_id)
        except NetworkError as error:
            log(logger, logging.DEBUG, "a ping was not answered", peer=peer_id, reason=error.message)
        links.note_ping(peer_id, rtt, is_relayed=not overlay.is_direct(peer_id), now=trio.current_time())

    while True:
        connected = [*overlay.peers_with(RING_PROTOCOL), *filter(overlay.is_connected, links.peers)]
        async with trio.open_nursery() as nursery:
            for peer_id in links.due(connected, trio.current_time()):
                nursery.start_soon(ping, peer_id)
        await trio.sleep(_ROUND_S)
