"""How often somebody may ask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.accounts.rate import RateLimit


def test_a_burst_and_then_a_pace() -> None:
    rate = RateLimit(burst=3, per_s=2.0)
    assert [rate.wait_s("a", 10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert rate.wait_s("b", 10.0) == 0.0
    assert rate.wait_s("a", 10.4) == pytest.approx(0.1)
    assert rate.wait_s("a", 10.5) == 0.0
    assert rate.wait_s("a", 10.5) == 0.5
    assert [rate.wait_s("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.integers(1, 5))
def test_nobody_gets_more_than_the_burst_and_the_pace(pauses: list[float], burst: int) -> None:
    rate, now, let_in = RateLimit(burst=burst, per_s=1.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait_s = rate.wait_s("a", now)
        if not wait_s:
            let_in += 1
        else:
            assert 0 < wait_s <= 1.0
    assert let_in <= burst + now + 1e-6


def test_as_many_are_remembered_as_may_be() -> None:
    rate = RateLimit(burst=1, per_s=0.001, remembered=2)
    assert rate.wait_s("a", 0.0) == rate.wait_s("b", 0.0) == rate.wait_s("c", 0.0) == 0.0
    assert rate.wait_s("c", 0.0) > 0
    assert rate.wait_s("b", 0.0) > 0
    assert rate.wait_s("a", 0.0) == 0.0  # forgotten
