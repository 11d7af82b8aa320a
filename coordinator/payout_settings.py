"""The settings of `azu-coordinator payouts`."""

from __future__ import annotations

from pydantic import Field

from azu.payments.settings import PaymentSettings
from azu.setting_types import Text, cli
from coordinator.ledger_settings import LedgerSettings

__all__ = ["PayoutSettings", "RetrySettings"]


class PayoutSettings(PaymentSettings, LedgerSettings):
    """A ledger, and the chain that its workers are paid on."""


class RetrySettings(PayoutSettings):
    """One payout of it."""

    payout_id: Text = Field(
        description="Its id, as `azu-coordinator payouts list` shows it.", json_schema_extra=cli(metavar="PAYOUT_ID")
    )
    lost: bool = Field(
        default=False,
        description="You have looked for its transaction, and it never landed: give the worker the money back. Refused "
        "where the chain does not agree that it cannot land any more.",
    )
