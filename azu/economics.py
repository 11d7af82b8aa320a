"""Token-layers to money, in integers of the chain's smallest unit only.

One token-layer is one token through one layer. The client pays `price` units for each; a worker gets 80% of what its
own layers earned, rounded down, and the platform the rest, so that the two always add up to what was paid.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAMPORTS_PER_TOKEN_LAYER", "Split", "split", "token_layers"]

LAMPORTS_PER_TOKEN_LAYER = 2
_WORKER_SHARE_PERCENT = 80


@dataclass(frozen=True, slots=True)
class Split:
    """How an amount is divided; `worker + platform` is the amount."""

    worker: int
    platform: int


def token_layers(tokens: int, layers: int) -> int:
    """Token-layers of `tokens` positions run through `layers` layers."""
    return tokens * layers


def split(amount: int) -> Split:
    """Divide `amount` (smallest units, not negative): 80% to the worker rounded down, the remainder to the platform."""
    worker = amount * _WORKER_SHARE_PERCENT // 100
    return Split(worker=worker, platform=amount - worker)
