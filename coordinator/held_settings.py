"""The settings of `azu-coordinator ledger held` and `decide`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from azu.setting_types import JobIdText, PeerId, cli
from coordinator.ledger_settings import LedgerSettings

__all__ = ["DecideSettings", "HeldSettings"]


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
