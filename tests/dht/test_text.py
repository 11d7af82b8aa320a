"""Nothing that a stranger writes reaches the terminal as more than letters."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.dht.text import clip, duration, printable, short_ids, spans, stretches
from tests.dht.records import identity


@given(st.text())
def test_printable_text_has_nothing_that_acts(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert not any(unicodedata.category(char).startswith(("C", "M", "Zl", "Zp")) for char in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("NVIDIA H100", "NVIDIA H100"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\u202eb\u200bc", "a\\u202eb\\u200bc"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("e\u0301 [bold]", "\u00e9 [bold]"),
        ("x\u0336", "x\\u0336"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.lists(st.booleans(), max_size=40))
def test_stretches_are_the_runs(flags: list[bool]) -> None:
    found = stretches(flags)
    assert [index for start, end in found for index in range(start, end)] == [i for i, flag in enumerate(flags) if flag]
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_short_ids_stay_apart() -> None:
    ids = [identity(number).peer_id for number in range(1, 30)]
    assert {len(short) for short in short_ids(ids).values()} == {9}
    twins = ["12D3KooW" + "A" * 36 + "12345678", "12D3KooW" + "B" * 36 + "12345678", "A12345678"]
    shown = short_ids(twins)
    assert len(set(shown.values())) == 3
    assert all(twin.endswith(shown[twin].removeprefix("…")) for twin in twins)
    assert short_ids([]) == {}


def test_forms() -> None:
    assert clip("abcdef", 4) == "abc…"
    assert clip("abcd", 4) == clip("abcd", None) == "abcd"
    assert spans([(0, 12), (15, 16)]) == "0-11, 15"
    assert spans([(0, 1), (2, 3), (4, 5)], 2) == "0, 2, 1 more"
    assert [duration(each) for each in (-3, 0, 119, 120, 7199, 7200, 200_000)] == [
        "0 s", "0 s", "119 s", "2 min", "119 min", "2 h", "2 d",
    ]  # fmt: skip
