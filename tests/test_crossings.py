"""Both sides of a seam say the same of it, wherever the job is ended, and of nothing else the same."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from azu.crossings import NOTHING, SeamLog, token_crossing

ROW = 4  # bytes

# Rows of each body that goes over the seam.
bodies = st.lists(st.integers(1, 5).map(lambda rows: bytes(range(rows * ROW))), min_size=1, max_size=8)


def log_of(sent: list[bytes], start: int = 0) -> SeamLog:
    log = SeamLog()
    for body in sent:
        log.note(start, len(body) // ROW, body)
        start += len(body) // ROW
    return log


def test_nothing_is_the_digest_of_nothing() -> None:
    assert SeamLog().until(100) == NOTHING == token_crossing(7, ())
    assert NOTHING.digest == hashlib.sha256().hexdigest()


def test_the_digest_is_chained_over_ends_and_last_rows() -> None:
    one = hashlib.sha256(hashlib.sha256().digest() + struct.pack("<I", 5) + b"last").digest()
    two = hashlib.sha256(one + struct.pack("<I", 6) + b"next").hexdigest()
    log = log_of([b"frstlast", memoryview(b"next")], start=3)  # type: ignore[list-item]
    assert (log.until(6).start, log.until(6).end, log.until(6).digest) == (3, 6, two)
    assert log.until(5).digest == one.hex()
    assert log.until(4) == NOTHING


def test_token_ids_are_hashed_as_they_travel() -> None:
    crossing = token_crossing(5, (1, 2**31 - 1))
    assert (crossing.start, crossing.end) == (5, 7)
    assert crossing.digest == hashlib.sha256(b"\x01\0\0\0\xff\xff\xff\x7f").hexdigest()


@given(bodies, st.integers(0, 2**20), st.integers(0, 8))
def test_a_side_that_is_ahead_says_the_same_of_what_both_have(sent: list[bytes], start: int, taken: int) -> None:
    theirs, ours = log_of(sent, start), log_of(sent[:taken], start)
    counted = start + sum(len(body) // ROW for body in sent[:taken])
    assert theirs.until(counted) == ours.until(counted)


@given(bodies, st.data())
def test_another_last_row_anywhere_makes_another_digest(sent: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(sent) - 1))
    other = [*sent[:index], sent[index][:-1] + b"\xff", *sent[index + 1 :]]
    assert log_of(sent).until(2**20) != log_of(other).until(2**20)


@given(bodies, st.integers(1, 2**20))
def test_the_same_rows_at_other_positions_make_another_digest(sent: list[bytes], shift: int) -> None:
    assert log_of(sent).until(2**21).digest != log_of(sent, shift).until(2**21).digest
