"""How can this node be reached? Finds out, and sees to it that it can be.

A node asks the relays that it is connected to what they see, and whether they can dial back. Where they cannot, it asks
its router for a mapping; where that fails too, it reserves slots at relays, through which others reach it, and from
there a direct connection is tried with each of them (azu.overlay.nat.punch).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify

from azu.errors import AzuError
from azu.logs import log
from azu.overlay.nat.autonat import AUTONAT, may_connect
from azu.overlay.nat.circuits import Circuits, Reservation
from azu.overlay.nat.dialing import DirectDials, is_public
from azu.overlay.nat.messages import decode_addresses, read_message
from azu.overlay.nat.relay import HOP

if TYPE_CHECKING:
    from azu.overlay.host import Overlay

__all__ = ["RELAYS_KEY", "Finding", "Reach", "Reachability", "beyond"]

logger = logging.getLogger(__name__)

# Provider key (32 bytes) under which volunteers that relay can be found.
RELAYS_KEY = hashlib.sha256(b"/azu/relays/1").digest()
IDENTIFY = "/ipfs/id/1.0.0"

_RELAYS = 2  # reservations that a node keeps
_ASKED = 4  # peers that are asked what they see
_CHECK_S = 300.0  # how often an answer is looked for again
_POLL_S = 1.0  # for relays that are gone, or were not there yet
_IDENTIFY_BYTES = 65_536
_IDENTIFY_S = 5.0
_LOOK_S = 30.0  # between two look-ups of volunteers

T = TypeVar("T")
MapPort = Callable[[int], Awaitable["str | None"]]


class Reach(Enum):
    """How others connect to this node."""

    UNKNOWN = "not known yet"
    LOCAL = "in this network"
    PUBLIC = "reachable"
    MAPPED = "reachable through a port that the router maps"
    PUNCHABLE = "by hole punching"
    RELAYED = "through relays only"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out.

    external: multiaddrs without /p2p at which strangers can connect. observed: the same at which our port is seen, and
    holes can be punched. relays: peer ids with a reservation for us.
    """

    reach: Reach = Reach.UNKNOWN
    external: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" at {', '.join(self.external)}" if self.external else ""
        if self.reach in (Reach.PUNCHABLE, Reach.RELAYED):
            where = f" ({len(self.relays)} relays hold a place for us)" if self.relays else " (no relay found yet)"
        return f"{self.reach.value}{where}"


class Reachability:
    """Keeps `finding` right while `run` runs.

    Args:
        map_port: asks the router for a mapping of a port of ours; returns the external multiaddr. None asks no router.
    """

    def __init__(self, overlay: Overlay, dials: DirectDials, circuits: Circuits, map_port: MapPort | None) -> None:
        self.finding = Finding()
        self.changed = trio.Event()  # set when `finding` changes, and then replaced
        self._overlay = overlay
        self._dials = dials
        self._circuits = circuits
        self._map_port = map_port
        self._reservations: dict[str, tuple[Reservation, float]] = {}  # and when to renew it
        self._refused: dict[str, float] = {}  # relays that are not asked again until then
        self._looked_at = float("-inf")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs beyond the interfaces' own, without our /p2p part."""
        circuits = [address for reservation, _ in self._reservations.values() for address in reservation.addresses]
        return (*self.finding.external, *circuits)

    async def run(self) -> None:
        """Find out, and again every few minutes; keep reservations where they are needed."""
        while True:
            await self._check()
            with trio.move_on_after(_CHECK_S if self.finding.reach != Reach.UNKNOWN else _POLL_S):
                while True:
                    if self.finding.reach in (Reach.PUNCHABLE, Reach.RELAYED):
                        await self._keep_reservations()
                    await trio.sleep(_POLL_S)

    async def _check(self) -> None:
        servers = self._overlay.peers_with(AUTONAT)
        if not servers:
            return
        outside = beyond({peer: self._overlay.remote_address(peer) for peer in servers})[:_ASKED]
        if not outside:
            self._note(Finding(Reach.LOCAL))
            return
        seen = [address for address in await _of_each(self._seen_by, outside) if address is not None]
        reached, answers = await self._try(outside, [*self._own_public(), *seen])
        if reached:
            self._note(Finding(Reach.PUBLIC, tuple(reached), tuple(reached)))
        elif answers:
            await self._go_behind_nat(outside, seen)

    async def _go_behind_nat(self, servers: list[str], seen: list[str]) -> None:
        if self.finding.reach == Reach.MAPPED and await self._map(servers):
            return
        # A router that takes another port for each destination cannot be told by one observer, who may lie, too.
        candidates = tuple(address for address in dict.fromkeys(seen) if 2 * seen.count(address) > len(seen))
        relays = tuple(self._reservations)
        self._note(Finding(Reach.PUNCHABLE if candidates else Reach.RELAYED, (), candidates, relays))
        await self._keep_reservations()  # before the router is asked, which may have to be waited for
        await self._map(servers)

    async def _map(self, servers: list[str]) -> bool:
        """Whether the router maps a port of ours so that strangers can connect."""
        source = self._dials.listening("ip4")  # the protocols that are spoken to routers are of IPv4
        mapped = await self._map_port(source[1]) if self._map_port is not None and source is not None else None
        if mapped is None or not (await self._try(servers, [mapped]))[0]:
            return False
        self._note(Finding(Reach.MAPPED, (mapped,), (mapped,)))
        return True

    def _own_public(self) -> list[str]:
        return [each for each in self._overlay.own_addresses if is_public(each)]

    async def _seen_by(self, peer_id: str) -> str | None:
        """Where a peer sees the port that we listen on, if it is connected to that."""
        if not self._dials.leaves_from_listener(peer_id):
            return None
        try:
            with trio.fail_after(_IDENTIFY_S):
                async with await self._dials.open_stream(peer_id, IDENTIFY) as stream:
                    told = await read_message(stream, Identify, limit=_IDENTIFY_BYTES)
        except (AzuError, trio.TooSlowError) as error:
            log(logger, logging.DEBUG, "not told what address we have", peer=peer_id, reason=str(error))
            return None
        return next((each for each in decode_addresses([told.observed_addr]) if is_public(each)), None)

    async def _try(self, servers: list[str], addresses: list[str]) -> tuple[list[str], int]:
        """Which of these addresses others could dial, and how many of them gave an answer.

        None where not most of them could dial any: a single one may lie, or be close to us.
        """
        if not addresses:
            return [], len(servers)

        async def ask(server: str) -> tuple[str | None] | None:
            try:
                return (await may_connect(self._overlay, server, addresses),)
            except (AzuError, trio.TooSlowError) as error:
                log(logger, logging.DEBUG, "not told whether we can be reached", peer=server, reason=str(error))
                return None

        answers = [answer for answer in await _of_each(ask, servers) if answer is not None]
        reached = [address for (address,) in answers if address is not None]
        return list(dict.fromkeys(reached)) if 2 * len(reached) > len(answers) else [], len(answers)

    async def _keep_reservations(self) -> None:
        now = trio.current_time()
        before = tuple(self._reservations)
        for relay in before:
            if not self._overlay.is_connected(relay):
                del self._reservations[relay]
        due = [relay for relay, (_, renew_at) in self._reservations.items() if now >= renew_at]
        if len(self._reservations) < _RELAYS:
            due += [relay for relay in await self._find_relays() if relay not in self._reservations]
        for relay in due:
            if len(self._reservations) >= _RELAYS and relay not in self._reservations:
                break
            await self._reserve(relay)
        if tuple(self._reservations) != before:
            finding = self.finding
            self._note(Finding(finding.reach, finding.external, finding.observed, tuple(self._reservations)))

    async def _find_relays(self) -> list[str]:
        """Relays that we are connected to, and else volunteers."""
        now = trio.current_time()
        known = self._overlay.peers_with(HOP)
        if len(known) < _RELAYS and now >= self._looked_at + _LOOK_S:
            self._looked_at = now
            try:
                for peer_id in (await self._overlay.providers(RELAYS_KEY))[:_ASKED]:
                    await self._overlay.connect(peer_id)
            except AzuError as error:
                log(logger, logging.DEBUG, "relays not looked up", reason=error.message)
            known = self._overlay.peers_with(HOP)
        return [peer for peer in known if self._refused.get(peer, now) <= now]

    async def _reserve(self, relay: str) -> None:
        try:
            reservation = await self._circuits.reserve(relay)
        except (AzuError, trio.TooSlowError) as error:
            log(logger, logging.DEBUG, "no reservation", relay=relay, reason=str(error))
            self._reservations.pop(relay, None)
            self._refused[relay] = trio.current_time() + _LOOK_S
        else:
            self._reservations[relay] = (reservation, trio.current_time() + reservation.seconds / 2)

    def _note(self, finding: Finding) -> None:
        if finding.reach not in (Reach.PUNCHABLE, Reach.RELAYED):
            self._reservations.clear()
        self._circuits.relays = set(self._reservations)
        if finding != self.finding:
            self.finding = finding
            log(logger, logging.INFO, "how others reach this node", reach=str(finding))
            self.changed.set()
            self.changed = trio.Event()


def beyond(locations: Mapping[str, str]) -> list[str]:
    """The peers that are in no private network, given the multiaddrs at which they are connected.

    Over IPv4 if there are such: who cannot be reached by that needs relays, also where an IPv6 address does for some.
    """
    public = [peer for peer, where in locations.items() if is_public(where)]
    return [peer for peer in public if locations[peer].startswith("/ip4/")] or public


async def _of_each(ask: Callable[[str], Awaitable[T]], peers: Sequence[str]) -> list[T]:
    """What all of them answer, asked at once: one that is silent must not keep the others waiting."""
    answers: list[T] = []

    async def note(peer: str) -> None:
        answers.append(await ask(peer))

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(note, peer)
    return answers
