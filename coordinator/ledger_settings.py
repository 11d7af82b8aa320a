"""The settings of `azu-coordinator ledger`, and where a ledger is."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from pydantic import Field

from azu.config import CatalogueSettings, CoordinatorSettings, LedgerPlace
from azu.setting_types import Text, cli

__all__ = ["CopySettings", "LedgerSettings", "StatementSettings", "ledger_place"]


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


class CopySettings(LedgerSettings):
    """Where to copy a ledger to."""

    target: Text = Field(
        description="The URL of a database without a ledger, such as postgresql://azu@db.example.org/azu.",
        json_schema_extra=cli(metavar="URL"),
    )


def ledger_place(settings: CoordinatorSettings | LedgerSettings) -> str | Path:
    """The ledger's URL, or its file in the data folder."""
    return settings.ledger_url or settings.data_dir / "ledger.sqlite3"
