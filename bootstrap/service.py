"""`azu-bootstrap run`: a DHT server with a lasting identity."""

from __future__ import annotations

import logging
from functools import partial

import click
import trio

from azu.config import BootstrapSettings
from azu.datadir import open_data_dir
from azu.joining import overlay_config, stay_joined
from azu.logs import log
from azu.metrics import serve_metrics
from azu.overlay import Overlay, RelayLimits, open_overlay
from azu.peerbook import PeerBook

__all__ = ["serve"]

logger = logging.getLogger(__name__)

AGENT = "azu-bootstrap/0.1.0"
_REMEMBER_S = 5.0


async def serve(settings: BootstrapSettings) -> None:
    """Answer DHT queries and relay until cancelled; prints the addresses to join through on stdout."""
    with open_data_dir(settings.data_dir) as identity:
        config = overlay_config(settings, identity, AGENT, relay=RelayLimits())
        async with open_overlay(config) as overlay, trio.open_nursery() as nursery:
            log(logger, logging.INFO, "bootstrap node ready", peer=identity.peer_id, addrs=overlay.addrs)
            click.echo("Join through one of these addresses:")
            for address in overlay.addrs:
                click.echo(f"  {address}")
            book = PeerBook(settings.data_dir / "peers.json")
            if settings.bootstrap or book:
                nursery.start_soon(partial(stay_joined, overlay, settings.bootstrap, book=book))
            else:
                nursery.start_soon(_remember, overlay, book)
            if settings.metrics is not None:
                host, _, port = settings.metrics.rpartition(":")
                await nursery.start(serve_metrics, overlay, (host.strip("[]"), int(port)), AGENT)
            await trio.sleep_forever()


async def _remember(overlay: Overlay, book: PeerBook) -> None:
    """Note who is there: the first bootstrap node of a swarm has nobody to join, until it is started again."""
    while True:
        book.note(overlay.servers())
        await trio.sleep(_REMEMBER_S)
