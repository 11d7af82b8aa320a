from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import InputError
from azu.payments import HYPE, SOL, UNITS, Coin
from azu.payments.coin import LARGEST_AMOUNT


@pytest.mark.parametrize(
    ("coin", "text", "amount"),
    [
        (HYPE, "0.001", 10**15),
        (HYPE, "0.000000000000000001", 1),
        (HYPE, "1", 10**18),
        (HYPE, "0.1", 10**17),  # a float would make 100000000000000005 of it, or the like
        (HYPE, "12345678.123456789012345678", 12345678123456789012345678),
        (HYPE, " 2.50000000000000000000000 ", 25 * 10**17),
        (SOL, "0.001", 1_000_000),
        (SOL, "0.000000001", 1),
        (UNITS, "17", 17),
        (UNITS, "17.0", 17),
        (SOL, "0", 0),
    ],
)
def test_parse(coin: Coin, text: str, amount: int) -> None:
    assert coin.parse(text) == amount


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", "1e-3", "nan", "inf", ".5", "1.", "1,5", "0x10", "1_000", "٣", "1" * 40, "0.0000000001", "1 2"],
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        SOL.parse(text)
    assert caught.value.code == "bad_amount"
    assert "0.5" in caught.value.remedy


def test_more_than_the_ledger_holds_is_refused() -> None:
    assert UNITS.parse(str(LARGEST_AMOUNT)) == LARGEST_AMOUNT
    with pytest.raises(InputError, match="more than there can be"):
        UNITS.parse(str(LARGEST_AMOUNT + 1))


@given(st.integers(0, LARGEST_AMOUNT), st.sampled_from([HYPE, SOL, UNITS]))
def test_text_and_amount_are_one(amount: int, coin: Coin) -> None:
    assert coin.parse(coin.format(amount).removesuffix(f" {coin.symbol}")) == amount


def test_format() -> None:
    assert HYPE.format(1) == "0.000000000000000001 HYPE"
    assert HYPE.format(10**18) == "1 HYPE"
    assert SOL.format(-1_500_000_000) == "-1.5 SOL"
    assert UNITS.format(100) == "100 units"
