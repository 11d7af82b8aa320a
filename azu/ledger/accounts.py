"""Names of accounts, and amounts.

A balance is what the platform owes: a deposit makes a client's larger and the chain's smaller, so that the chain's is
minus what lies there. `FREE` is what the operator gives away, `FEES` what chains took for payouts; both are below zero.
"""

from __future__ import annotations

import re

from azu.errors import InputError

__all__ = [
    "FEES",
    "FREE",
    "MAX_AMOUNT",
    "PLATFORM",
    "chain",
    "check_amount",
    "check_name",
    "client",
    "held",
    "kind_of",
    "may_be_negative",
    "paying",
    "reserved",
    "worker",
]

# Smallest units. All the wei there are need 97 bits; the sums of a ledger's life stay below this.
MAX_AMOUNT = 2**128
PLATFORM = "platform"
FEES = "fees"
FREE = "free"

_UNBOUNDED = frozenset({PLATFORM, FEES, FREE, "chain"})
# Wallets, peer ids, job, key and transaction ids. No blank and no quote: they are printed in tables and CSV.
_NAME = re.compile(r"[A-Za-z0-9._:/@+=-]{1,200}")


def client(wallet: str) -> str:
    """What a client may spend."""
    return f"client:{wallet}"


def reserved(wallet: str) -> str:
    """What is put aside for a client's running jobs."""
    return f"reserved:{wallet}"


def worker(peer_id: str) -> str:
    """What a worker is owed."""
    return f"worker:{peer_id}"


def held(peer_id: str) -> str:
    """Earnings in dispute, paid to nobody."""
    return f"held:{peer_id}"


def paying(peer_id: str) -> str:
    """A payout under way."""
    return f"paying:{peer_id}"


def chain(provider: str) -> str:
    """The coin on the chain of a payment provider."""
    return f"chain:{provider}"


def kind_of(account: str) -> str:
    """What comes before the colon, or the whole name."""
    return account.partition(":")[0]


def may_be_negative(account: str) -> bool:
    """Whether the account may fall below zero; those of clients and workers never do."""
    return kind_of(account) in _UNBOUNDED


def check_amount(amount: object, *, least: int = 0) -> int:
    """The amount, an int from `least` to below 2**128.

    Raises:
        InputError: code "bad_amount".
    """
    if not isinstance(amount, int) or isinstance(amount, bool):
        raise _bad_amount(f"{str(amount)[:40]!r} is no whole number")
    if not least <= amount < MAX_AMOUNT:
        raise _bad_amount("it is too large" if amount > 0 else f"it is below {least}")
    return amount


def check_name(name: object, what: str) -> str:
    """A wallet, peer id or other id that may become part of an account's or a transaction's name.

    Raises:
        InputError: code "bad_name".
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{str(name)[:40]!r} is no usable {what}",
            code="bad_name",
            remedy="Use up to 200 letters, digits and ._:/@+=-",
        )
    return name


def _bad_amount(why: str) -> InputError:
    remedy = "Amounts are whole numbers of the chain's smallest unit"
    return InputError(f"the amount cannot be used: {why}", code="bad_amount", remedy=remedy)
