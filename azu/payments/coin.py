"""A chain's coin, and its amounts as people write them: integers of the smallest unit inside, decimal text outside."""

from __future__ import annotations

import re
from dataclasses import dataclass

from azu.errors import InputError

__all__ = ["HYPE", "LARGEST_AMOUNT", "SOL", "UNITS", "Coin"]

LARGEST_AMOUNT = 2**128 - 1  # smallest units; above all there will ever be of either coin, and what the ledger holds
_FORM = re.compile(r"(?P<whole>\d{1,39})(?:\.(?P<part>\d{1,39}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Coin:
    """`unit` is the smallest unit's name; `decimals` of them make one coin: 10**decimals units."""

    symbol: str
    unit: str
    decimals: int

    def parse(self, text: str) -> int:
        """Smallest units from decimal text such as "0.001"; no float is made on the way.

        Raises:
            InputError: code "bad_amount": not decimal text, finer than the smallest unit, or too large.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise self._refused(text, "is not an amount")
        part = (match["part"] or "").rstrip("0")
        if len(part) > self.decimals:
            raise self._refused(text, f"is finer than a {self.unit}")
        amount = int(match["whole"] + part.ljust(self.decimals, "0"))
        if amount > LARGEST_AMOUNT:
            raise self._refused(text, "is more than there can be")
        return amount

    def format(self, amount: int) -> str:
        """The whole amount as decimal text with the symbol: "0.001 HYPE", "-1 SOL"."""
        whole, part = divmod(abs(amount), 10**self.decimals)
        text = f"{whole}.{part:0{self.decimals}}".rstrip("0").rstrip(".") if self.decimals else str(whole)
        return f"{'-' if amount < 0 else ''}{text} {self.symbol}"

    def _refused(self, text: str, what: str) -> InputError:
        remedy = (
            f"Write {self.symbol} as decimal text with at most {self.decimals} digits after the point, such as 0.5."
        )
        return InputError(f"{text[:60]!r} {what}", code="bad_amount", remedy=remedy)


HYPE = Coin("HYPE", "wei", 18)
SOL = Coin("SOL", "lamport", 9)
UNITS = Coin("units", "unit", 0)
