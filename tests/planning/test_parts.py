"""What flows in parts of what workers hold: chains that make it up, and prices that say that there is no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.planning.parts import Parts
from azu.planning.snapshot import Power, Range
from azu.planning.steps import finish

CLOSE = 2e-4


def seconds(n_layers: int, power: Power) -> list[float]:
    return [0.0, *(1 / power.rate(layers, n_layers) for layers in range(1, n_layers + 1))]


def assert_it_can_flow(parts: Parts, times: Sequence[Sequence[float]], rate: float) -> None:
    """Chains of parts of what is held, through all layers, for which workers have the time."""
    busy: Counter[int] = Counter()
    total = 0.0
    for chain, tokens in zip(parts._basis, parts._tokens, strict=True):
        assert tokens >= -1e-6
        if not chain or tokens < 1e-6:
            continue
        steps = sorted(chain, key=lambda part: part[1])
        assert [steps[0][1], steps[-1][2]] == [0, parts.n_layers]
        assert all(one[2] == other[1] for one, other in pairwise(steps))
        for worker, start, end in steps:
            held = parts.held[worker]
            assert held is not None
            assert held[0] <= start < end <= held[1]
            busy[worker] += tokens * times[worker][end - start]
        total += tokens
    assert total == pytest.approx(rate, rel=1e-5, abs=1e-5)
    assert all(each <= 1 + 1e-5 for each in busy.values())


def assert_no_more_can_flow(parts: Parts, times: Sequence[Sequence[float]], rate: float) -> None:
    """Whatever the tolls up to each border, no more flows than workers could earn with any part of what they hold."""
    tolls = parts.tolls()
    assert (tolls[0], tolls[-1]) == (0, pytest.approx(1))
    most = 0.0
    for worker, range_ in enumerate(parts.held):
        if range_:
            borders = range(range_[0], range_[1] + 1)
            earned = [(tolls[b] - tolls[a]) / times[worker][b - a] for a, b in combinations(borders, 2)]
            most += max(0.0, *earned)
            assert list(parts.earnings(worker, tolls, [range_])) == [pytest.approx(max(0.0, *earned))]
    assert most <= rate * (1 + CLOSE) + 1e-5


powers = st.builds(Power, st.floats(0.3, 30.0), st.floats(0.0, 2.0))


@settings(max_examples=300)
@given(st.integers(1, 12), st.lists(powers, min_size=1, max_size=8), st.data())
def test_as_much_flows_as_can_whoever_holds_what_next(
    n_layers: int, machines: list[Power], data: st.DataObject
) -> None:
    times = [seconds(n_layers, power) for power in machines]
    ranges = st.sampled_from(list(combinations(range(n_layers + 1), 2)))
    parts = Parts(times)
    for _ in range(data.draw(st.integers(1, 4))):
        for worker in range(len(machines)):
            if data.draw(st.booleans()):
                parts.give(worker, data.draw(st.none() | ranges))
        other = parts.copy()
        rate = finish(parts.flow())
        assert_it_can_flow(parts, times, rate)
        assert_no_more_can_flow(parts, times, rate)
        above = rate * data.draw(st.sampled_from([0.5, 0.99, 1.01, 2.0]))
        assert (finish(other.flow(above)) > above) == (rate > above)


@given(st.integers(2, 12), st.data())
def test_what_it_would_earn_is_looked_at_in_all_ranges_at_once(n_layers: int, data: st.DataObject) -> None:
    parts = Parts([seconds(n_layers, Power(1.0, 0.5))])
    tolls = [0.0, *sorted(data.draw(st.lists(st.floats(0, 1), min_size=n_layers, max_size=n_layers)))]
    starts = sorted(data.draw(st.sets(st.integers(0, n_layers - 1), min_size=1)))
    ends = sorted(data.draw(st.integers(start + 1, n_layers)) for start in starts)
    ranges: list[Range] = [pair for pair in zip(starts, ends, strict=True) if pair[0] < pair[1]]
    assert list(parts.earnings(0, tolls, ranges)) == [next(parts.earnings(0, tolls, [each])) for each in ranges]


def test_a_part_of_a_long_range_fills_a_gap() -> None:
    """10 layers a second, and half a second for each hop; the second half is a part of all layers."""
    half, whole = Power(10.0, 0.5), Power(10.0, 0.5)
    parts = Parts([seconds(10, half), seconds(10, whole)])
    parts.give(0, (0, 5))
    parts.give(1, (0, 10))
    # One alone gives a token in a second. Both together: x through the second alone, y through both, a second each.
    assert finish(parts.flow()) == pytest.approx(1.0, rel=1e-3)
    parts.give(1, (5, 10))
    assert finish(parts.flow()) == pytest.approx(1.0, rel=1e-3)
    parts.give(1, None)
    assert finish(parts.flow()) == 0.0
    assert parts.tolls() == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
