"""Join a swarm for a look, as a client that listens nowhere and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from azu.config import DhtSettings
from azu.dht.diagnosis import explain
from azu.errors import AzuError, InputError, NetworkError
from azu.overlay import Overlay, OverlayConfig, open_overlay, parse_peer_multiaddr
from azu.records import VALIDATORS
from azu.swarm_key import read_swarm_key

__all__ = ["AGENT", "entrances", "rejoin", "visit"]

AGENT = "azu-dht/0.1.0"
SETTLE_SECONDS = 2.0  # for meeting the neighbours, from the first connection on
SECOND_TRY_SECONDS = 5.0
_POLL_SECONDS = 0.02


@asynccontextmanager
async def visit(settings: DhtSettings) -> AsyncIterator[Overlay]:
    """Join the settings' swarm, and leave at the end.

    Raises:
        InputError: no address, or a malformed one. NetworkError: nobody answers, or nobody of an azu swarm; its code
        and remedy say which of the many ways to fail it was.
    """
    if not settings.bootstrap:
        raise InputError(
            "no bootstrap address was given",
            code="no_bootstrap",
            remedy="Add --bootstrap MULTIADDR with an address that `azu-bootstrap run` prints, or set AZU_BOOTSTRAP",
        )
    config = OverlayConfig(
        os.urandom(32),
        listen=(),
        server=False,
        agent=AGENT,
        validators=VALIDATORS,
        swarm_key=read_swarm_key(settings.swarm_key),
    )
    async with open_overlay(config) as overlay:
        await rejoin(overlay, settings)
        yield overlay


async def rejoin(overlay: Overlay, settings: DhtSettings) -> None:
    """Join, and meet the neighbours.

    Raises:
        NetworkError: as `visit` does.
    """
    await _enter(overlay, settings)
    if not overlay.statistics().routing_table:
        with trio.move_on_after(SECOND_TRY_SECONDS):
            await overlay.bootstrap(settings.bootstrap)  # it may only be slow to say that it serves the DHT
        if not overlay.statistics().routing_table:
            raise _no_dht(overlay)


def entrances(overlay: Overlay, settings: DhtSettings) -> list[str]:
    """The peer ids of --bootstrap that let us in."""
    given = dict.fromkeys(parse_peer_multiaddr(each).peer_id for each in settings.bootstrap)
    return [peer_id for peer_id in given if overlay.is_connected(peer_id)]


async def _enter(overlay: Overlay, settings: DhtSettings) -> None:
    """Wait no longer for slow peers once somebody has let us in: we stay for seconds only."""
    failed: list[AzuError] = []

    async def hurry() -> None:
        while not overlay.connected_peers():  # noqa: ASYNC110 - the overlay has no event for it
            await trio.sleep(_POLL_SECONDS)
        scope.deadline = trio.current_time() + SETTLE_SECONDS

    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        nursery.start_soon(hurry)
        try:
            await overlay.bootstrap(settings.bootstrap)
        except AzuError as error:  # carried out of the nursery, which would wrap it in a group
            failed.append(error)
        scope.cancel()
    if failed and isinstance(failed[0], NetworkError):
        raise await explain(overlay, settings.bootstrap, has_key=settings.swarm_key is not None)
    if failed:
        raise failed[0]


def _no_dht(overlay: Overlay) -> NetworkError:
    """Somebody let us in who knows nothing of the swarm."""
    return NetworkError(
        f"{', '.join(overlay.connected_peers()) or 'the peer'} answers, but serves no DHT",
        code="no_dht",
        remedy="Give the address of a bootstrap node, as `azu-bootstrap run` prints it",
    )
