"""The azu-node program."""

from __future__ import annotations

from functools import partial

from azu.cli import begin_logging, program, run_program, settings_options
from azu.config import NodeSettings
from node.engine.openmp import openmp_settled
from node.settings import EarningsSettings, LeaveSettings, PlanSettings, StatusSettings

__all__ = ["main"]


@program(
    "azu-node",
    examples=[
        "azu-node join /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW... --vram 8GiB",
        "azu-node status",
        "azu-node leave",
        "azu-node plan Qwen/Qwen3-8B --vram 8GiB --dtype int4",
        "azu-node join /dns4/boot.example.org/tcp/4001/p2p/12D3KooW... --device cuda:1 --payout-address 0x...",
    ],
)
def main() -> None:
    """Lend this machine to a swarm: it loads some layers of a model, serves them, and earns per token-layer."""


@main.command()
@settings_options(NodeSettings, positional="bootstrap")
def join(settings: NodeSettings) -> None:
    """Join a swarm and serve layers until stopped (Ctrl-C, SIGTERM, or `azu-node leave`).

    A worker that is stopped has others take its jobs over first; a second signal ends it at once.
    """
    import trio

    with openmp_settled(settings.threads, settings.device):
        from node.service import serve  # torch and libp2p load here, so that --help is fast

    leave = trio.Event()
    run_program(partial(serve, settings, leave), settings=settings, at_signal=leave.set)


@main.command()
@settings_options(PlanSettings, positional="model")
def plan(settings: PlanSettings) -> None:
    """Say what of a model would fit into how much memory, without downloading or loading it."""
    from node.plan import plan as print_plan

    begin_logging(settings)
    print_plan(settings)


@main.command()
@settings_options(StatusSettings)
def status(settings: StatusSettings) -> None:
    """Say what the worker on this machine does: its layers and jobs, and what its time goes into.

    Times are means over the last minute and since the worker started, beside the longest of their kind.
    """
    from node.status import print_status

    begin_logging(settings)
    print_status(settings)


@main.command()
@settings_options(LeaveSettings)
def leave(settings: LeaveSettings) -> None:
    """Stop the worker on this machine once others have taken its jobs over, as SIGTERM does, and wait until it ends."""
    from node.leave import leave as leave_swarm

    begin_logging(settings)
    leave_swarm(settings)


@main.command()
@settings_options(EarningsSettings)
def earnings(settings: EarningsSettings) -> None:
    """Say what this machine's worker has earned, by its own signed tickets and receipts.

    The worker may be running or not. Amounts are in the smallest unit of each coordinator's currency.
    """
    from node.earnings import print_earnings

    begin_logging(settings)
    print_earnings(settings)
