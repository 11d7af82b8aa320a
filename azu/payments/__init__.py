"""Money on chains: deposits are verified, workers are paid. Nothing heavy is loaded by importing this.

coin        amounts as integers of the smallest unit, and as text
addresses   wallets' addresses, checked without a chain's library
base        what every provider does; hyperliquid, solana and none are those that there are; factory chooses one
rpc         JSON-RPC at several URLs; answers reads what comes back
keys        the platform's private key
"""

from __future__ import annotations

from azu.payments.base import Deposit, Landing, PaymentProvider, Refusal, SignedPayout
from azu.payments.coin import HYPE, SOL, UNITS, Coin
from azu.payments.factory import coin_of, open_provider

__all__ = [
    "Deposit", "Landing", "PaymentProvider", "Refusal", "SignedPayout",
    "HYPE", "SOL", "UNITS", "Coin",
    "coin_of", "open_provider",
]  # fmt: skip
