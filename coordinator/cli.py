"""The azu-coordinator program."""

from __future__ import annotations

from functools import partial

from azu.cli import program, run_program, settings_options
from azu.config import CoordinatorSettings

__all__ = ["main"]


@program(
    "azu-coordinator",
    examples=[
        "azu-coordinator serve --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW... --model Qwen/Qwen3-0.6B",
        "azu-coordinator serve --bootstrap /dns4/boot.example.org/tcp/4001/p2p/12D3KooW... --model ./model.gguf",
    ],
)
def main() -> None:
    """Plan, meter and answer OpenAI clients for a swarm of workers. No tensor passes through it."""


@main.command()
@settings_options(CoordinatorSettings)
def serve(settings: CoordinatorSettings) -> None:
    """Publish models, keep them covered by the swarm's workers, and answer at http://HOST:PORT/v1."""
    from coordinator.service import serve as serve_coordinator  # libp2p loads here, so that --help is fast

    run_program(partial(serve_coordinator, settings), settings=settings)
