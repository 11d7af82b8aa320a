"""The settings of `azu-coordinator ledger`, and where a ledger is."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field

from azu.config import CatalogueSettings, CoordinatorSettings, LedgerPlace
from azu.setting_types import JobIdText, PeerId, Text, cli

__all__ = ["DecideSettings", "HeldSettings", "LedgerSettings", "StatementSettings", "ledger_place"]


class LedgerSettings(CatalogueSettings, LedgerPlace):
    """A look into a ledger, whether or not a coordinator runs on it."""


class StatementSettings(LedgerSettings):
    """One account of it."""

    account: Text = Field(
        description="Such as client:WALLET, worker:PEER_ID, held:PEER_ID, platform, chain:PROVIDER, fees or free.",
        json_schema_extra=cli(metavar="ACCOUNT"),
    )
    since: date | None = Field(
        default=None,
        description="The first day to show, in UTC, such as 2026-11-29. All where omitted.",
        json_schema_extra=cli(metavar="DAY"),
    )


class HeldSettings(LedgerSettings):
    """Earnings in dispute."""

    decided: bool = Field(default=False, description="Show those that were decided on, too.")


class DecideSettings(LedgerSettings):
    """What becomes of a worker's earnings in dispute."""

    worker: PeerId = Field(
        description="The worker whose earnings are held, by its peer id.", json_schema_extra=cli(metavar="PEER_ID")
    )
    outcome: Literal["worker", "client"] = Field(
        description="Pay the worker, or give the client back what it paid, with the platform's share.",
        json_schema_extra=cli(option="--for"),
    )
    job: JobIdText | None = Field(
        default=None,
        description="Decide on this job alone; on all that is held of this worker where omitted.",
        json_schema_extra=cli(metavar="JOB_ID"),
    )


def ledger_place(settings: CoordinatorSettings | LedgerSettings) -> str | Path:
    """The ledger's URL, or its file in the data folder."""
    return settings.ledger_url or settings.data_dir / "ledger.sqlite3"
