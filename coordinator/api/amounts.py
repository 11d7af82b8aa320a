"""Amounts of money in JSON: whole numbers of the chain's smallest unit.

Out: a number below 2^53, which every JSON reader keeps exactly, and a string of its digits from there on. JavaScript's
BigInt(x) and Python's int(x) read both. In: the same, both ways; a fraction, an exponent or a sign is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from azu.payments.coin import LARGEST_AMOUNT

__all__ = ["AmountIn", "amount_out"]

_EXACT = 2**53  # doubles, which many readers make of a number, skip some integers from here on
_DIGITS: Final = re.compile(r"[0-9]{1,39}", re.ASCII)


def amount_out(amount: int) -> int | str:
    """An amount as it is written."""
    return amount if abs(amount) < _EXACT else str(amount)


def _amount_in(value: object) -> int:
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise PydanticCustomError("amount_type", "expected a whole number of smallest units, or a string of its digits")
    if not 0 <= value <= LARGEST_AMOUNT:
        raise PydanticCustomError("amount_range", "expected an amount from 0 to 2^128 - 1")
    return value


AmountIn = Annotated[int, BeforeValidator(_amount_in)]
