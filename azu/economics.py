"""Token-layers to money, in integers of the chain's smallest unit only.

One token-layer is one token through one layer. The client pays `price` units for each; a worker gets 80% of what its
own layers earned, rounded down, and the platform the rest, so that the two always add up to what was paid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "LAMPORTS_PER_TOKEN_LAYER",
    "MAX_PRICE",
    "PRICES",
    "Split",
    "highest_token_layers",
    "split",
    "token_layers",
]

LAMPORTS_PER_TOKEN_LAYER = 2
_WORKER_SHARE_PERCENT = 80


# Smallest units per token-layer by payment provider, where the operator sets no other price. HYPE has 18 decimals and
# SOL has 9: either costs 0.000000002 of its coin.
PRICES: Mapping[str, int] = {
    "hyperliquid": LAMPORTS_PER_TOKEN_LAYER * 10**9,
    "solana": LAMPORTS_PER_TOKEN_LAYER,
    "none": LAMPORTS_PER_TOKEN_LAYER,
}
# A ticket holds the price in 63 bits.
MAX_PRICE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Split:
    """How an amount is divided; `worker + platform` is the amount."""

    worker: int
    platform: int


def token_layers(tokens: int, layers: int) -> int:
    """Token-layers of `tokens` positions run through `layers` layers."""
    return tokens * layers


def highest_token_layers(prompt_tokens: int, max_tokens: int, layers: int) -> int:
    """The most that a job can come to: all of the answer but its last token runs through every layer."""
    return token_layers(prompt_tokens + max_tokens - 1, layers)


def split(amount: int) -> Split:
    """Divide `amount` (smallest units, not negative): 80% to the worker rounded down, the remainder to the platform."""
    worker = amount * _WORKER_SHARE_PERCENT // 100
    return Split(worker=worker, platform=amount - worker)
