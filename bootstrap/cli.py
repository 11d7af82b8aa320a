"""The azu-bootstrap program."""

from __future__ import annotations

from functools import partial

from azu.cli import program, run_program, settings_options
from azu.config import BootstrapSettings

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
