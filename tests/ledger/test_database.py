"""URLs, upgrades, currencies, and a database server that goes away and comes back."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from azu.errors import InputError, InternalError
from azu.ledger import Database, Ledger, database
from azu.ledger.accounts import client
from azu.ledger.schema import METADATA
from tests.ledger.books import WALLET, opened
from tests.ledger.postgres import Server


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "mysql://a/b", "sqlite://", "sqlite:///:memory:", "postgresql+asyncpg://a/b", "sqlite:///x:y@["],
)
def test_urls_that_cannot_be_used(text: str) -> None:
    if text == "sqlite:///x:y@[":
        Database(text).close()  # a strange name of a file, but one
        return
    with pytest.raises(InputError) as raised:
        Database(text)
    assert raised.value.code == "bad_ledger_url"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://azu:secret@db/azu",
        "postgres://azu:secret@db/azu",
        "postgresql://azu:secret@db/azu?password=secret",
    ],
)
def test_passwords_are_not_shown(text: str) -> None:
    with closing(Database(text)) as database:
        assert database.name == "postgresql+psycopg://azu:***@db/azu"


def test_the_tables_are_those_of_the_schema(url: str) -> None:
    with closing(Database(url)) as database:
        database.prepare("wei")
        differences = database.read(
            lambda connection: compare_metadata(MigrationContext.configure(connection), METADATA)
        )
    assert [each for each in differences if "alembic_version" not in str(each)] == []


async def test_a_ledger_has_one_currency(url: str) -> None:
    async with opened(url):
        pass
    with pytest.raises(InputError) as raised:
        async with opened(url, currency="lamports"):
            raise AssertionError
    assert raised.value.code == "ledger_currency"


async def test_a_newer_ledger_is_left_alone(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.write(execute("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InputError) as raised:
        async with opened(url):
            raise AssertionError
    assert raised.value.code == "ledger_newer"
    with closing(Database(url)) as database, pytest.raises(InputError, match="newer"):
        database.check()


def execute(statement: str) -> Callable[[Connection], Any]:
    return lambda connection: connection.exec_driver_sql(statement)


async def test_many_open_a_new_ledger_at_once(url: str) -> None:
    async def use(number: int) -> None:
        async with Ledger.open(url, currency="wei") as ledger:
            await ledger.deposit("none", "test", f"tx{number}", WALLET, 1)

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(use, number)
    async with opened(url) as ledger:
        assert await ledger.balance(client(WALLET)) == 6


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "odd name?#%.sqlite3"
    with closing(Database(path)) as database:
        database.prepare("wei")
        database.check()
        modes = [stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()]
        assert len(modes) == 3
        assert set(modes) == {0o600}


def test_a_file_that_cannot_be_made_or_is_none(tmp_path: Path) -> None:
    with (
        closing(Database(tmp_path / "nowhere" / "x.sqlite3")) as database,
        pytest.raises(InternalError, match="nowhere"),
    ):
        database.prepare("wei")
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(b"this is no database, and long enough to tell" * 50)
    with closing(Database(path)) as database, pytest.raises(InternalError) as raised:
        database.prepare("wei")
    assert raised.value.code == "ledger_failed"
    assert str(path) in raised.value.message


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_RETRY_S", 0.1)
    with closing(Database(f"postgresql://azu@/azu?host={tmp_path}")) as absent, pytest.raises(InternalError) as raised:
        absent.prepare("wei")
    assert raised.value.code == "ledger_unreachable"


async def test_a_server_that_crashes_and_comes_back(postgres: Server) -> None:
    url = postgres.url()
    async with opened(url) as ledger:
        await ledger.deposit("none", "test", "before", WALLET, 1)
        await trio.to_thread.run_sync(postgres.stop)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ledger.deposit, "none", "test", f"meanwhile{number}", WALLET, 1)
            await trio.sleep(0.2)
            postgres.start()  # here, since it ends with the thread that started it
        assert await ledger.balance(client(WALLET)) == 21


async def test_a_coordinator_that_hangs_is_cut_off(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the lock that all writers need; the others go on once the database has ended its transaction."""
    url = postgres.url()
    async with opened(url):
        pass
    monkeypatch.setattr(database, "_SESSION", ("SET lock_timeout = '100ms'",))
    with psycopg.connect(url) as hanging:
        hanging.execute("SET idle_in_transaction_session_timeout = '1s'")
        hanging.execute("SELECT * FROM head FOR UPDATE")
        async with opened(url) as ledger:
            await ledger.deposit("none", "test", "tx", WALLET, 1)
            assert await ledger.balance(client(WALLET)) == 1
        hanging.close()
