"""Money: nothing appears, nothing gets lost, and nobody gets a fraction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.economics import (
    LAMPORTS_PER_TOKEN_LAYER,
    MAX_PRICE,
    PRICES,
    Split,
    highest_token_layers,
    split,
    token_layers,
)

amounts = st.integers(0, 10**30)


@given(amounts)
def test_the_shares_add_up_to_what_was_paid(amount: int) -> None:
    shares = split(amount)
    assert shares.worker + shares.platform == amount
    assert shares.worker >= 0
    assert shares.platform >= 0
    assert type(shares.worker) is int
    assert type(shares.platform) is int


@given(amounts)
def test_the_worker_gets_four_fifths_rounded_down(amount: int) -> None:
    worker = split(amount).worker
    assert 5 * worker <= 4 * amount < 5 * (worker + 1)


@given(amounts, amounts)
def test_splitting_parts_never_pays_workers_more_than_the_whole(one: int, other: int) -> None:
    assert split(one).worker + split(other).worker <= split(one + other).worker


@pytest.mark.parametrize(
    ("amount", "worker", "platform"),
    [(0, 0, 0), (1, 0, 1), (2, 1, 1), (4, 3, 1), (5, 4, 1), (9, 7, 2), (10, 8, 2), (100, 80, 20)],
)
def test_examples(amount: int, worker: int, platform: int) -> None:
    assert split(amount) == Split(worker, platform)


def test_large_amounts_are_exact() -> None:
    assert split(10**18 + 1) == Split(8 * 10**17, 2 * 10**17 + 1)  # a float would be off by more than one


@given(st.integers(0, 10**7), st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_stages_together_do_the_models_token_layers(tokens: int, stages: list[int]) -> None:
    assert sum(token_layers(tokens, layers) for layers in stages) == token_layers(tokens, sum(stages))


def test_the_default_price_is_a_whole_number() -> None:
    assert type(LAMPORTS_PER_TOKEN_LAYER) is int
    assert LAMPORTS_PER_TOKEN_LAYER > 0


def test_every_provider_has_a_price_that_a_ticket_can_hold() -> None:
    assert set(PRICES) == {"hyperliquid", "solana", "none"}
    assert all(type(price) is int and 0 < price <= MAX_PRICE for price in PRICES.values())
    assert PRICES["solana"] == 2
    assert PRICES["hyperliquid"] == 2 * 10 ** (18 - 9), "the same part of a coin"


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 1000), st.data())
def test_no_job_comes_to_more_than_the_highest(prompt: int, most: int, layers: int, data: st.DataObject) -> None:
    emitted = data.draw(st.integers(1, most))
    assert token_layers(prompt + emitted - 1, layers) <= highest_token_layers(prompt, most, layers)
    assert highest_token_layers(prompt, most, layers) == token_layers(prompt + most - 1, layers)
