"""A worker's own book: written once, bounded, and right after a crash at any instant."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from azu.crossings import NOTHING
from azu.errors import InternalError
from azu.tickets import JobTicket, Receipt
from node.book import BOOK_FILE, Book, Earned, Served, entry_of

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def served(number: int = 0, **changes: object) -> Served:
    entry = Served(f"{number:032x}", 0, "boss", 1_000 + number, True, 9, 90, 2**70, b"t" * 300, b"r" * 300)
    return replace(entry, **changes)  # type: ignore[arg-type]


async def test_a_job_is_written_down_once(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for _ in range(2):
        await book.write(served())
    await book.write(served(1, coordinator="other", is_settled=False, earned=0, token_layers=0))
    assert book.earned() == (
        Earned("boss", 1, 0, 90, 2**70, 1_000, 1_000),
        Earned("other", 1, 1, 0, 0, 1_001, 1_001),
    )
    assert Book(tmp_path).find(served().job_id) == (served(),)
    assert book.find("f" * 32) == ()
    assert [each.ended_at for each in book.latest(5)] == [1_001, 1_000]
    assert [each.ended_at for each in book.latest(1)] == [1_001]


async def test_jobs_that_end_together_are_written_together(tmp_path: Path) -> None:
    book = Book(tmp_path)
    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(book.write, served(number))
        nursery.start_soon(book.write, served(7))
    assert book.earned()[0].jobs == 200
    (tmp_path / BOOK_FILE).write_bytes(b"damaged" * 2_000)
    failed = 0

    async def write(number: int) -> None:
        nonlocal failed
        with pytest.raises(InternalError):
            await book.write(served(number))
        failed += 1

    async with trio.open_nursery() as nursery:
        for number in range(200, 205):
            nursery.start_soon(write, number)
    assert failed == 5


async def test_sums_outlive_what_is_deleted_for_its_room(tmp_path: Path) -> None:
    book = Book(tmp_path, keep_bytes=64 << 10)
    for number in range(150):
        await book.write(served(number))
    assert book.earned() == (Earned("boss", 150, 0, 150 * 90, 150 * 2**70, 1_000, 1_149),)
    assert (tmp_path / BOOK_FILE).stat().st_size < 128 << 10
    assert not book.find(served(0).job_id)
    assert book.find(served(149).job_id)


async def test_sums_outlive_what_is_deleted_for_its_age(tmp_path: Path) -> None:
    book = Book(tmp_path, keep_s=100)
    for number in range(3):
        await book.write(served(number))
    await book.write(served(3, ended_at=1_102))
    assert [bool(book.find(served(number).job_id)) for number in range(4)] == [False, False, True, True]
    assert book.earned()[0].jobs == 4


async def test_what_was_served_does_not_change(tmp_path: Path) -> None:
    await Book(tmp_path).write(served())
    with sqlite3.connect(tmp_path / BOOK_FILE) as db, pytest.raises(sqlite3.IntegrityError, match="does not change"):
        db.execute("UPDATE served SET earned = '0'")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / BOOK_FILE).write_bytes(b"this is no database, and long enough to tell" * 50)
    with pytest.raises(InternalError, match=BOOK_FILE) as raised:
        Book(tmp_path)
    assert raised.value.code == "earnings_failed"


_WRITER = """
import sys, trio
from pathlib import Path
from tests.node.test_book import Book, served
async def main():
    book = Book(Path(sys.argv[1]))
    for number in range(int(sys.argv[2]), 10**9):
        await book.write(served(number))
        print(number, flush=True)
trio.run(main)
"""


def test_a_kill_at_any_instant_loses_nothing_that_was_told(tmp_path: Path) -> None:
    told = -1
    for count in (1, 7, 20):
        arguments = [sys.executable, "-c", _WRITER, str(tmp_path), str(told + 1)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(count):
                told = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
        book = Book(tmp_path)
        kept = [number for number in range(told + 50) if book.find(served(number).job_id)]
        assert kept == list(range(len(kept)))  # without a gap, and at most one that was not told yet
        assert told < len(kept)
        assert book.earned()[0] == Earned(
            "boss", len(kept), 0, len(kept) * 90, len(kept) * 2**70, 1_000, 999 + len(kept)
        )
        told = len(kept) - 1


# --- what an entry says


def entry(counted: int | None, tokens: int = 7, price: int = 2) -> Served:
    stages = [{"peer_id": PEER, "start": 0, "end": 10}]
    ticket = JobTicket.model_validate(
        {
            "job_id": b"j" * 16, "epoch": 1, "manifest": "c" * 64, "n_layers": 10, "stages": stages, "dtype": "float32",
            "prompt_tokens": 5, "max_tokens": 100, "stop_tokens": (), "sampling": {}, "price": price,
            "begun_at": 0, "issued_at": 0, "expires_at": 1, "coordinator": PEER,
        }
    )  # fmt: skip
    receipt = Receipt(
        job_id=ticket.job_id, epoch=1, stage=0, peer_id=PEER, start=0, end=10, tokens=tokens, received=NOTHING,
        sent=NOTHING, issued_at=77,
    )  # fmt: skip
    return entry_of(ticket, receipt, counted, (b"ticket", b"receipt"))


def test_a_job_earns_for_what_both_sides_count() -> None:
    assert (entry(3).token_layers, entry(3).earned) == (70, 112)
    assert entry(2).token_layers == 60  # the client hung up: the last position is nobody's
    assert entry(90).token_layers == 70  # a coordinator that counts more than went through these layers
    assert entry(0).earned == 0
    assert (entry(3).job_id, entry(3).epoch, entry(3).ended_at) == ((b"j" * 16).hex(), 1, 77)


def test_a_job_that_the_coordinator_did_not_end_earns_nothing_yet() -> None:
    left = entry(None)
    assert (left.is_settled, left.positions, left.token_layers, left.earned) == (False, 7, 0, 0)
