"""The azu-bootstrap program."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from azu.cli import program, run_program, settings_options
from azu.config import BaseAzuSettings, BootstrapSettings
from azu.swarm_key import write_new_swarm_key

__all__ = ["main"]


@program(
    "azu-bootstrap",
    examples=[
        "azu-bootstrap run",
        "azu-bootstrap run --listen /ip4/0.0.0.0/tcp/4001 --data-dir /var/lib/azu-bootstrap",
    ],
)
def main() -> None:
    """Run a swarm's meeting point: a DHT server whose address the other nodes are given."""


@main.command()
@settings_options(BootstrapSettings)
def run(settings: BootstrapSettings) -> None:
    """Serve the DHT until stopped, and print the multiaddrs to join through."""
    from bootstrap.service import serve  # libp2p loads here, so that --help is fast

    run_program(partial(serve, settings), settings=settings)


@main.command("new-swarm-key")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@settings_options(BaseAzuSettings)
def new_swarm_key(settings: BaseAzuSettings, path: Path) -> None:
    """Make the key file of a private swarm at PATH.

    Copy it to every member over a safe way, and start all with --swarm-key PATH. Who has it can join.
    """
    run_program(partial(_new_swarm_key, path), settings=settings)


async def _new_swarm_key(path: Path) -> None:
    write_new_swarm_key(path)
    click.echo(f"The new swarm's key is in {path}. Start every member with --swarm-key {path}")
