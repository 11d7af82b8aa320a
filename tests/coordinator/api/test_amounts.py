"""Amounts in JSON keep every digit, and nothing that is no amount is taken for one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from azu.payments.coin import LARGEST_AMOUNT
from coordinator.api.amounts import AmountIn, amount_out


class Body(BaseModel):
    amount: AmountIn


def read(value: Any) -> int:
    return Body.model_validate({"amount": value}).amount


@given(st.integers(0, LARGEST_AMOUNT) | st.integers(2**53 - 3, 2**53 + 3))
def test_what_goes_out_comes_in(amount: int) -> None:
    written = json.loads(json.dumps(amount_out(amount)))
    assert int(written) == read(written) == read(str(amount)) == amount
    # What a reader makes of a number is exact, as a double too.
    assert isinstance(written, str) or int(float(written)) == amount


def test_the_border() -> None:
    assert amount_out(2**53 - 1) == 2**53 - 1
    assert amount_out(2**53) == "9007199254740992"
    assert amount_out(-(2**53)) == "-9007199254740992"


NO_NUMBERS = [1.0, 0.5, True, None, "", "-1", "+1", "1.0", "1e3", "0x1", " 1", "1 ", "\u0661", "9" * 40]


@pytest.mark.parametrize("value", [-1, LARGEST_AMOUNT + 1, *NO_NUMBERS])
def test_what_is_no_amount(value: Any) -> None:
    with pytest.raises(ValidationError):
        read(value)
