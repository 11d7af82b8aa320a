"""No chain at all: a private swarm's work is free, and its ledger counts all the same."""

from __future__ import annotations

from azu.errors import InputError
from azu.payments.base import Deposit, Landing, Refusal, SignedPayout
from azu.payments.coin import UNITS

__all__ = ["NoPayments"]

_NOTHING = Refusal(
    "no_payments", "this swarm takes and pays no money", "PAYMENT_PROVIDER names a chain where one shall."
)


class NoPayments:
    """See `azu.payments.base.PaymentProvider`: every deposit and every payout is refused, code "no_payments"."""

    name = "none"
    chain = "none"
    coin = UNITS
    address = ""
    max_in_flight = 1

    def read_address(self, text: str) -> str | Refusal:
        """No address is one."""
        return _NOTHING

    async def verify_deposit(self, txid: str, wallet: str) -> Deposit | Refusal:
        """No deposit is one."""
        return _NOTHING

    async def balance(self, address: str) -> int:
        """Nobody has anything."""
        return 0

    async def sign_payout(self, payee: str, amount: int, *, label: str, after: int | None) -> SignedPayout | Refusal:
        """Nobody is paid."""
        return _NOTHING

    async def send(self, payout: SignedPayout) -> Refusal | None:
        """There is nothing to send to: a payout of another provider's is left alone."""
        return _NOTHING

    async def look(self, payout: SignedPayout) -> Landing:
        """Raises InputError, code "other_provider": a payout of a chain can be followed there only."""
        raise InputError(
            f"payout {payout.txid} was made for a chain, and PAYMENT_PROVIDER is none",
            code="other_provider",
            remedy="Set PAYMENT_PROVIDER to the one that it was made with",
        )

    async def reprice(self, payout: SignedPayout) -> None:
        """There are no fees."""
