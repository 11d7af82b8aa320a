"""`azu-bootstrap run`: a DHT server with a lasting identity."""

from __future__ import annotations

import logging

import click
import trio

from azu.config import BootstrapSettings
from azu.datadir import open_data_dir
from azu.joining import stay_joined
from azu.logs import log
from azu.overlay import OverlayConfig, RelayLimits, open_overlay
from azu.records import VALIDATORS
from azu.swarm_key import read_swarm_key

__all__ = ["serve"]

logger = logging.getLogger(__name__)

AGENT = "azu-bootstrap/0.1.0"


async def serve(settings: BootstrapSettings) -> None:
    """Answer DHT queries and relay until cancelled; prints the addresses to join through on stdout."""
    with open_data_dir(settings.data_dir) as identity:
        config = OverlayConfig(
            seed=identity.seed,
            listen=settings.listen,
            agent=AGENT,
            validators=VALIDATORS,
            swarm_key=read_swarm_key(settings.swarm_key),
            relay=RelayLimits(),
        )
        async with open_overlay(config) as overlay, trio.open_nursery() as nursery:
            log(logger, logging.INFO, "bootstrap node ready", peer=identity.peer_id, addrs=overlay.addrs)
            click.echo("Join through one of these addresses:")
            for address in overlay.addrs:
                click.echo(f"  {address}")
            if settings.bootstrap:
                nursery.start_soon(stay_joined, overlay, settings.bootstrap)
            await trio.sleep_forever()
