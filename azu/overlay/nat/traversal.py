"""All of this folder, put together for one overlay."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from azu.errors import NetworkError
from azu.logs import log
from azu.overlay._patches import AzuSwarm
from azu.overlay._tcp import BufferedTCP
from azu.overlay.nat.autonat import AUTONAT, AutoNatServer
from azu.overlay.nat.circuits import Circuits
from azu.overlay.nat.dialing import DirectDials, is_public
from azu.overlay.nat.mapping import PortMapper
from azu.overlay.nat.punch import DCUTR, Puncher
from azu.overlay.nat.reachability import RELAYS_KEY, Finding, Reachability
from azu.overlay.nat.relay import HOP, STOP, Relay, RelayLimits, RelayStatistics
from azu.overlay.providers import ANNOUNCE_SECONDS

if TYPE_CHECKING:
    from azu.overlay.host import Overlay

__all__ = ["Traversal"]

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_PUNCH_SECONDS = 5.0  # how long a new connection by relay is given to become a direct one


class Traversal:
    """How an overlay reaches others, and is reached.

    Args:
        relay: what this node relays for others; None relays nothing, and answers no AutoNAT questions either.
        port_mapping: whether the router may be asked to lead a port of its own here.
    """

    def __init__(
        self, overlay: Overlay, swarm: AzuSwarm, tcp: BufferedTCP, relay: RelayLimits | None, *, port_mapping: bool
    ) -> None:
        self._overlay = overlay
        self._dials = DirectDials(swarm, tcp)
        self._puncher = Puncher(self._dials, lambda: self._reachability.finding.observed)
        self._circuits = Circuits(overlay, swarm, self._puncher)
        self._mapper = PortMapper() if port_mapping else None
        map_port = None if self._mapper is None else self._mapper.map_port
        self._reachability = Reachability(overlay, self._dials, self._circuits, map_port)
        self._relay = None if relay is None else Relay(overlay, relay)
        swarm.dial_circuit, swarm.circuit_left = self._circuits.dial, self._circuits.left
        overlay.handle(STOP, self._circuits.handle_stop)
        overlay.handle(DCUTR, self._puncher.handle)
        if self._relay is not None:
            overlay.handle(HOP, self._relay.handle)
            overlay.handle(AUTONAT, AutoNatServer(self._dials).handle)

    @property
    def finding(self) -> Finding:
        """How others reach this node."""
        return self._reachability.finding

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs beyond the interfaces' own, without our /p2p part."""
        return self._reachability.addresses

    def statistics(self) -> RelayStatistics | None:
        """What is being relayed; None where nothing may be."""
        return self._relay.statistics() if self._relay is not None else None

    def is_relaying(self, peer_id: str) -> bool:
        """Whether a peer has a place at our relay, or keeps one for us."""
        return peer_id in self._circuits.relays or (self._relay is not None and self._relay.is_reserved(peer_id))

    async def run(self) -> None:
        """Find out how others reach this node, and see to it that they can, until cancelled."""
        if self._dials.is_listening:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reachability.run)
                if self._mapper is not None:
                    nursery.start_soon(self._mapper.run)
                else:
                    log(logger, logging.INFO, "port mapping is switched off: the router is not asked for a port")
                if self._relay is not None:
                    nursery.start_soon(self._volunteer)

    async def _volunteer(self) -> None:
        """Let those find us that need a relay, where they can connect to us."""
        while True:
            provided = False
            if self.finding.external or any(is_public(each) for each in self._overlay.own_addresses):
                try:
                    await self._overlay.provide(RELAYS_KEY)
                    provided = True
                except NetworkError as error:
                    log(logger, logging.DEBUG, "not announced as a relay", reason=error.message)
            await trio.sleep(ANNOUNCE_SECONDS if provided else _RETRY_SECONDS)

    async def changed(self) -> None:
        """Wait until `finding` has changed."""
        await self._reachability.changed.wait()

    def is_direct(self, peer_id: str) -> bool:
        """Whether there is a connection to a peer that goes through no relay."""
        return self._dials.is_direct(peer_id)

    async def until_direct(self, peer_id: str) -> None:
        """Wait until there is one."""
        await self._dials.until_direct(peer_id)

    async def upgrade(self, peer_id: str) -> None:
        """Where the connection to a peer goes through a relay, give it time to become a direct one."""
        if not self.is_direct(peer_id):
            await self._puncher.settled(peer_id, _PUNCH_SECONDS)
