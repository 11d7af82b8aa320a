"""The azu-coordinator program."""

from __future__ import annotations

from functools import partial

from azu.cli import begin_logging, program, run_program, settings_options
from azu.config import CatalogueSettings, CoordinatorSettings, RemoveSettings, ShardSettings
from coordinator.held_settings import DecideSettings, HeldSettings
from coordinator.ledger_settings import CopySettings, LedgerSettings, StatementSettings
from coordinator.payout_settings import PayoutSettings, RetrySettings

__all__ = ["main"]


@program(
    "azu-coordinator",
    examples=[
        "azu-coordinator shard Qwen/Qwen3-0.6B",
        "azu-coordinator serve --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...",
        "azu-coordinator serve --bootstrap /dns4/boot.example.org/tcp/4001/p2p/12D3KooW... --model ./model.gguf",
        "azu-coordinator models --json",
        "azu-coordinator ledger verify",
        "azu-coordinator payouts list",
    ],
)
def main() -> None:
    """Plan, meter and answer OpenAI clients for a swarm of workers. No tensor passes through it."""


@main.command()
@settings_options(CoordinatorSettings)
def serve(settings: CoordinatorSettings) -> None:
    """Keep models covered by the swarm's workers, and answer at http://HOST:PORT/v1.

    Serves what was sharded into the data folder, and what --model names.
    """
    from coordinator.service import serve as serve_coordinator  # libp2p loads here, so that --help is fast

    run_program(partial(serve_coordinator, settings), settings=settings)


@main.command()
@settings_options(ShardSettings, positional="model")
def shard(settings: ShardSettings) -> None:
    """Cut a model into layer files, sign its manifest, and have it served.

    A coordinator that runs on the same data folder serves it at once, another one when it is started. May be
    interrupted and run again: what was downloaded or cut is kept. An unchanged revision is not cut again.
    """
    from coordinator.catalogue_commands import shard as shard_model

    run_program(partial(shard_model, settings), settings=settings)


@main.command()
@settings_options(CatalogueSettings)
def models(settings: CatalogueSettings) -> None:
    """List the models that were sharded into a data folder."""
    from coordinator.catalogue_commands import list_models

    begin_logging(settings)
    list_models(settings)


@main.command()
@settings_options(RemoveSettings, positional="model_id")
def remove(settings: RemoveSettings) -> None:
    """Serve a sharded model no longer, and delete its files."""
    from coordinator.catalogue_commands import remove as remove_model

    begin_logging(settings)
    remove_model(settings)


@main.command()
@settings_options(CatalogueSettings)
def prune(settings: CatalogueSettings) -> None:
    """Delete what interrupted cuts left that are not to be gone on with; no file of any model."""
    from coordinator.catalogue_commands import prune as prune_files

    begin_logging(settings)
    prune_files(settings)


@main.group()
def ledger() -> None:
    """Check and read the ledger, whether or not coordinators write to it."""


@ledger.command()
@settings_options(LedgerSettings)
def verify(settings: LedgerSettings) -> None:
    """Compare everything that the ledger keeps twice, and every digest; ends with 1 where anything is wrong."""
    from coordinator.ledger_commands import verify_ledger

    begin_logging(settings)
    verify_ledger(settings)


@ledger.command()
@settings_options(LedgerSettings)
def export(settings: LedgerSettings) -> None:
    """Print every transaction: CSV, a line for each posting; with --json a line for each transaction."""
    from coordinator.ledger_commands import export_ledger

    begin_logging(settings)
    export_ledger(settings)


@ledger.command()
@settings_options(StatementSettings, positional="account")
def statement(settings: StatementSettings) -> None:
    """Show what moved on one account, and its balance after each move."""
    from coordinator.ledger_commands import show_statement

    begin_logging(settings)
    show_statement(settings)


@ledger.command()
@settings_options(CopySettings, positional="target")
def copy(settings: CopySettings) -> None:
    """Copy the whole ledger into another database, while no coordinator runs on the data folder."""
    from coordinator.ledger_commands import copy_to

    begin_logging(settings)
    copy_to(settings)


@ledger.command()
@settings_options(HeldSettings)
def held(settings: HeldSettings) -> None:
    """Show earnings that are paid to nobody, since receipts are missing or disagree."""
    from coordinator.held_commands import show_held

    begin_logging(settings)
    show_held(settings)


@ledger.command()
@settings_options(DecideSettings, positional="worker")
def decide(settings: DecideSettings) -> None:
    """Decide what becomes of a worker's held earnings. This is final."""
    from coordinator.held_commands import decide_held

    run_program(partial(decide_held, settings), settings=settings)


@main.group()
def payouts() -> None:
    """See what workers are owed, and pay them."""


@payouts.command("list")
@settings_options(PayoutSettings)
def list_payouts(settings: PayoutSettings) -> None:
    """Show what workers are owed, and every payout."""
    from coordinator.payout_commands import list_payouts as show

    begin_logging(settings)
    show(settings)


@payouts.command()
@settings_options(PayoutSettings)
def run(settings: PayoutSettings) -> None:
    """Pay what is planned, and see every payout through; needs the private key.

    A coordinator plans a payout for each worker that is owed enough and names a wallet; one that has the private key
    pays them too. May be interrupted and run again, and beside a coordinator that pays: nobody is paid twice.
    """
    from coordinator.payout_commands import run_payouts

    run_program(partial(run_payouts, settings), settings=settings)


@payouts.command()
@settings_options(RetrySettings, positional="payout_id")
def retry(settings: RetrySettings) -> None:
    """Take one payout up again: one that failed is planned and paid anew, one under way is sent again."""
    from coordinator.payout_commands import retry_payout

    run_program(partial(retry_payout, settings), settings=settings)
