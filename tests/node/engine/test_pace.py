"""A stage's pace out of passes whose true cost is known, and out of real ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.records import Speed
from node.engine.pace import Pace

LAYERS = 10
BASE, TOKEN, PROMPT = 0.004, 0.0003, 0.0001  # seconds a layer


def cost(tokens: int, chunk_rows: int = 0) -> float:
    return LAYERS * (BASE + tokens * TOKEN + chunk_rows * PROMPT)


def run(pace: Pace, passes: int, noise: float = 0.0, most: int = 16) -> None:
    chance = random.Random(1)
    for _ in range(passes):
        tokens = chance.randint(1, most)
        pace.note(cost(tokens) * (1 + chance.uniform(-noise, noise)), LAYERS, [1] * tokens)


def test_nothing_is_known_before_the_first_pass() -> None:
    pace = Pace()
    assert pace.speed() == Speed()
    pace.note(1.0, LAYERS, [3])  # too short a piece of a prompt
    assert pace.speed() == Speed()


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_base_and_slope_are_found(noise: float) -> None:
    pace = Pace()
    run(pace, 200, noise)
    speed = pace.speed()
    assert speed.decode_base_ns == pytest.approx(BASE * 1e9, rel=0.001 + noise)
    assert speed.decode_token_ns == pytest.approx(TOKEN * 1e9, rel=0.001 + 2 * noise)


def test_what_a_token_adds_stays_known_while_all_passes_are_alike() -> None:
    pace = Pace()
    run(pace, 100)
    for _ in range(1_000):
        pace.note(2 * cost(5), LAYERS, [1] * 5)  # another program takes half of the machine
    speed = pace.speed()
    assert speed.decode_token_ns == pytest.approx(2 * TOKEN * 1e9, rel=0.3)
    assert speed.decode_base_ns + 5 * speed.decode_token_ns == pytest.approx(2 * cost(5) / LAYERS * 1e9, rel=0.001)


def test_a_stage_whose_jobs_take_turns_has_no_base() -> None:
    pace = Pace(shares_passes=False)
    for _ in range(9):
        pace.note(LAYERS * TOKEN, LAYERS, [1])
    assert pace.speed() == Speed(decode_token_ns=round(TOKEN * 1e9))


def test_a_prompts_share_of_a_pass_is_what_the_tokens_in_it_do_not_take() -> None:
    pace = Pace()
    run(pace, 100)
    for rows in ([256], [1, 200, 1], [1, 1, 1, 64, 40]):
        tokens, chunk_rows = rows.count(1), sum(each for each in rows if each > 1)
        seconds = cost(tokens, chunk_rows) if tokens else LAYERS * chunk_rows * PROMPT
        pace.note(seconds, LAYERS, rows)
        assert pace.speed().prefill_ns == pytest.approx(PROMPT * 1e9, rel=0.01)


def test_a_stall_is_no_pace() -> None:
    pace = Pace()
    run(pace, 100)
    pace.note(60.0, LAYERS, [1] * 4)
    pace.note(60.0, LAYERS, [200])
    pace.note(60.0, LAYERS, [1] * 4)
    assert pace.speed().decode_base_ns < 1.6 * BASE * 1e9


def test_a_change_shows_within_a_few_hundred_passes() -> None:
    pace = Pace()
    run(pace, 500)
    for _ in range(300):
        pace.note(3 * cost(1), LAYERS, [1])
        pace.note(3 * cost(9), LAYERS, [1] * 9)
    assert pace.speed().decode_base_ns == pytest.approx(3 * BASE * 1e9, rel=0.01)
    pace.clear()
    assert pace.speed() == Speed()


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1e3), st.integers(1, 200), st.lists(st.integers(1, 300), min_size=1, max_size=32)),
        max_size=60,
    ),
    st.booleans(),
)
def test_whatever_passes_take_a_record_can_hold_it(
    passes: list[tuple[float, int, list[int]]], shares_passes: bool
) -> None:
    pace = Pace(shares_passes=shares_passes)
    for each in passes:
        pace.note(*each)
        speed = pace.speed()
        assert min(speed.decode_base_ns, speed.decode_token_ns, speed.prefill_ns) >= 0
