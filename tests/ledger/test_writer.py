"""The writing thread: what waits is committed together, cancelling is safe, and nobody suffers for another's fault."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from sqlalchemy import Connection

from azu.errors import InternalError
from azu.ledger import Deposited, Ledger, writer
from azu.ledger.accounts import client
from tests.ledger.books import WALLET, opened

LIMIT = 60


@asynccontextmanager
async def held_up(ledger: Ledger, nursery: trio.Nursery) -> AsyncIterator[None]:
    """The writing thread hangs in a transaction for as long as the context lasts."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(connection: Connection) -> None:
        begun.set()
        assert go_on.wait(LIMIT)

    nursery.start_soon(ledger.write, wait)
    try:
        await until(begun.is_set)
        yield
    finally:
        go_on.set()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.001)


def deposit(ledger: Ledger, txid: str, amount: int = 1) -> Callable[[], object]:
    async def call() -> Deposited:
        return await ledger.deposit("none", "test", txid, WALLET, amount)

    return call


async def test_what_waits_is_committed_together(url: str) -> None:
    commits = 0

    async with opened(url) as ledger:
        write = ledger._database.write

        def counted(work: object) -> object:
            nonlocal commits
            commits += 1
            return write(work)  # type: ignore[arg-type]

        ledger._database.write = counted  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery, held_up(ledger, nursery):
            for number in range(300):
                nursery.start_soon(deposit(ledger, f"tx{number}"))  # type: ignore[arg-type]
            await until(lambda: len(ledger._writer._waiting) == 300)
        assert commits == 2
        assert await ledger.balance(client(WALLET)) == 300


async def test_cancelled_before_its_turn_it_never_happens(url: str) -> None:
    async with opened(url) as ledger:
        async with trio.open_nursery() as nursery, held_up(ledger, nursery):
            with trio.move_on_after(0.05) as scope:
                await ledger.deposit("none", "test", "tx", WALLET, 1)
            assert scope.cancelled_caught
            assert not ledger._writer._waiting
        assert await ledger.export() == []
        assert (await ledger.deposit("none", "test", "tx", WALLET, 1)).is_new


async def test_cancelled_in_its_turn_it_has_happened(url: str) -> None:
    """Whoever asked is gone before the commit; asked again, the ledger knows."""
    async with opened(url) as ledger:
        go_on, begun = threading.Event(), threading.Event()
        write = ledger._database.write

        def slow(work: object) -> object:
            begun.set()
            assert go_on.wait(LIMIT)
            return write(work)  # type: ignore[arg-type]

        ledger._database.write = slow  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deposit(ledger, "tx"))  # type: ignore[arg-type]
            await until(begun.is_set)
            nursery.cancel_scope.cancel()
        go_on.set()
        assert not (await ledger.deposit("none", "test", "tx", WALLET, 1)).is_new
        assert await ledger.balance(client(WALLET)) == 1


async def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_WAITING", 10)
    async with (
        opened(f"sqlite:///{tmp_path}/ledger.sqlite3") as ledger,
        trio.open_nursery() as nursery,
        held_up(ledger, nursery),
    ):
        for number in range(30):
            nursery.start_soon(deposit(ledger, f"tx{number}"))  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(ledger._writer._waiting) == 9  # and the one that hangs


async def test_the_event_loop_goes_on_meanwhile(url: str) -> None:
    async with opened(url) as ledger, trio.open_nursery() as nursery, held_up(ledger, nursery):
        for _ in range(10):
            await trio.sleep(0.001)


async def test_what_others_do_wrong_is_their_own(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """One of a group breaks a constraint: its group is written one by one, and all others are in."""
    async with opened(url) as ledger:

        def forbid(connection: Connection) -> None:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("ALTER TABLE deposits ADD CHECK (txid <> 'poison')")
            else:
                connection.exec_driver_sql(
                    "CREATE TRIGGER poison BEFORE INSERT ON deposits WHEN NEW.txid = 'poison' "
                    "BEGIN SELECT RAISE(ABORT, 'poison'); END"
                )

        await ledger.write(forbid)
        failures: list[InternalError] = []

        async def try_to(txid: str) -> None:
            try:
                await ledger.deposit("none", "test", txid, WALLET, 1)
            except InternalError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery, held_up(ledger, nursery):
            for txid in ("a", "b", "poison", "c"):
                nursery.start_soon(try_to, txid)
            await until(lambda: len(ledger._writer._waiting) == 4)
        assert [error.code for error in failures] == ["ledger_failed"]
        assert await ledger.balance(client(WALLET)) == 3
        assert "one by one" in caplog.text


async def test_other_work_fails_alone_and_leaves_nothing(url: str) -> None:
    async with opened(url) as ledger:

        def fail(connection: Connection) -> None:
            connection.exec_driver_sql("CREATE TABLE more (id INTEGER)")
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await ledger.write(fail)
        with pytest.raises(InternalError, match="more"):
            await ledger.read(lambda connection: connection.exec_driver_sql("SELECT * FROM more"))
        await ledger.deposit("none", "test", "tx", WALLET, 1)


async def test_what_waits_at_the_end_is_written(url: str) -> None:
    async with opened(url) as ledger:
        async with trio.open_nursery() as nursery, held_up(ledger, nursery):
            nursery.start_soon(deposit(ledger, "tx"))  # type: ignore[arg-type]
            await until(lambda: len(ledger._writer._waiting) == 1)
            nursery.start_soon(ledger._writer.__aexit__)
            await until(lambda: ledger._writer._is_closing)
        assert await ledger.balance(client(WALLET)) == 1
        with pytest.raises(InternalError) as raised:
            await ledger.deposit("none", "test", "late", WALLET, 1)
        assert raised.value.code == "ledger_closed"


async def test_the_threads_of_a_closed_ledger_are_gone(url: str) -> None:
    async with opened(url):
        assert any(thread.name == "azu-ledger" for thread in threading.enumerate())
    assert not any(thread.name == "azu-ledger" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
