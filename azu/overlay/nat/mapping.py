"""Asking the router to lead a port of its own to ours: by NAT-PMP, and where that is not understood, by UPnP.

What a router answers is believed as far as it goes: its address must be public, and whether strangers really get
through is for others to say (azu.overlay.nat.autonat).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from azu.errors import AzuError, NetworkError, ProtocolError
from azu.logs import log
from azu.overlay.faults import shielded
from azu.overlay.nat.gateway import find_gateway
from azu.overlay.nat.natpmp import NatPmp
from azu.overlay.nat.upnp import find_igds

__all__ = ["PortMapper"]

logger = logging.getLogger(__name__)

_MAP_SECONDS = 12.0  # finding out and asking, by both protocols
_LEAVE_SECONDS = 2.0  # taking all mappings away
_LIFETIME = 3600  # seconds; so long a mapping stays after a crash
_LEAST_RENEWAL = 1.0  # seconds; whatever lifetime the router grants


class Router(Protocol):
    """A router that can be asked for mappings; see NatPmp for the contract."""

    @property
    def name(self) -> str: ...
    async def external_address(self) -> str: ...
    async def add(self, port: int, wanted: int, lifetime: int) -> tuple[int, int]: ...
    async def remove(self, port: int, external: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Mapping:
    """TCP connections to address:external arrive at our `port`. Times are trio's."""

    router: Router
    port: int
    address: str
    external: int
    renew_at: float
    expires_at: float

    @property
    def multiaddr(self) -> str:
        return f"/ip4/{self.address}/tcp/{self.external}"


class PortMapper:
    """Mappings that are renewed, and in the end taken away, while `run` runs.

    Args:
        lifetime: seconds that routers are asked for.
    """

    def __init__(self, lifetime: int = _LIFETIME) -> None:
        self._lifetime = lifetime
        self._mappings: dict[int, _Mapping] = {}  # by our port
        self._changed = trio.Event()
        self._lock = trio.Lock()

    async def map_port(self, port: int) -> str | None:
        """Have the router lead a TCP port to ours; the multiaddr outside, or None where no router does within 12 s.

        Where there is such a mapping already it is renewed, since the router may have forgotten it in a restart.
        """
        async with self._lock:
            try:
                with trio.fail_after(_MAP_SECONDS):
                    mapping = await self._mapped(port, self._mappings.get(port))
            except (NetworkError, ProtocolError, trio.TooSlowError) as error:
                log(logger, logging.DEBUG, "no port mapping", reason=str(error) or "the router takes too long")
                return None
            self._mappings[port] = mapping
            self._changed.set()
            return mapping.multiaddr

    async def run(self) -> None:
        """Renew mappings in time, until cancelled; then take them away, which takes 2 s at most."""
        try:
            while True:
                self._changed = trio.Event()
                due = min((each.renew_at for each in self._mappings.values()), default=float("inf"))
                with trio.move_on_at(due):
                    await self._changed.wait()
                await self._renew()
        finally:
            with shielded(_LEAVE_SECONDS):
                for mapping in self._mappings.values():
                    await _remove(mapping)
            self._mappings.clear()

    async def _renew(self) -> None:
        """Renew what is due. What cannot be renewed is tried again in half of the time that it has left."""
        for mapping in list(self._mappings.values()):
            if mapping.renew_at > trio.current_time() or await self.map_port(mapping.port) is not None:
                continue
            now = trio.current_time()
            if now < mapping.expires_at:
                later = now + max((mapping.expires_at - now) / 2, _LEAST_RENEWAL)
                self._mappings[mapping.port] = replace(mapping, renew_at=later)
            else:
                del self._mappings[mapping.port]
                log(logger, logging.WARNING, "the router maps the port no longer", address=mapping.multiaddr)

    async def _mapped(self, port: int, before: _Mapping | None) -> _Mapping:
        """By the router that did it before, or whoever does it now. Raises where nobody does."""
        wanted = port if before is None else before.external
        known = [] if before is None else [before.router]
        gateway = find_gateway()
        for router in (*known, NatPmp(gateway)):
            if (mapping := await self._ask(router, port, wanted, before)) is not None:
                return mapping
        for router in await find_igds(gateway):
            if (mapping := await self._ask(router, port, wanted, before)) is not None:
                return mapping
        raise NetworkError("no router maps the port")

    async def _ask(self, router: Router, port: int, wanted: int, before: _Mapping | None) -> _Mapping | None:
        try:
            address = await router.external_address()
            external, granted = await router.add(port, wanted, self._lifetime)
        except (NetworkError, ProtocolError) as error:
            log(logger, logging.DEBUG, "a router maps no port", protocol=router.name, reason=error.message)
            return None
        now = trio.current_time()
        seconds = min(granted or self._lifetime, self._lifetime)
        mapping = _Mapping(router, port, address, external, now + max(seconds / 2, _LEAST_RENEWAL), now + seconds)
        if before is None or before.multiaddr != mapping.multiaddr:
            log(logger, logging.INFO, "the router maps a port", protocol=router.name, address=mapping.multiaddr)
        return mapping


async def _remove(mapping: _Mapping) -> None:
    try:
        await mapping.router.remove(mapping.port, mapping.external)
    except AzuError as error:
        log(logger, logging.DEBUG, "port mapping not taken away", address=mapping.multiaddr, reason=error.message)
