"""Tampering: the database itself refuses it, and `verify` finds what was done around its triggers."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, select

from azu.errors import InputError
from azu.ledger import Database, Ledger, copy_ledger, verify
from azu.ledger.schema import METADATA
from tests.ledger.books import FOREVER, PEERS, WALLET, ended, opened
from tests.ledger.postgres import Server

Execute = Callable[[str], None]


async def fill(url: str) -> None:
    """One of everything."""
    async with opened(url, key_limits=lambda _, key_ids: {}) as ledger:
        for number in range(2):
            await ledger.deposit("c", "main", f"tx{number}", WALLET, 1000)
            await ledger.reserve(f"job{number}", WALLET, 700, "key", expires_at=FOREVER)
        await ledger.settle(ended("job0", 600, held=(1,)))
        await ledger.reserve("released", WALLET, 5, expires_at=FOREVER)
        await ledger.release("released")
        await ledger.settle(ended("gift", 90), is_free=True)
        await ledger.reserve("late", WALLET, 5, expires_at=FOREVER)
        await ledger.release("late")
        await ledger.settle(ended("late", 30))
        for number in range(3):
            await ledger.payout_plan(f"p{number}", PEERS[0], "c", "a", 10)
        await ledger.payout_signed(["p0"], "t", b"raw")
        await ledger.payout_confirmed(["p0"], "t", fee=3)
        await ledger.payout_failed(["p1"], "never landed")


def editor(url: str) -> Execute:
    """Statements as somebody with the database's own tools would give them."""

    def execute(statement: str) -> None:
        if url.startswith("sqlite"):
            with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
                db.execute(statement)
        else:
            with psycopg.connect(url) as connection:
                connection.execute(statement.encode())

    return execute


def disarm(url: str, execute: Execute) -> None:
    """Take the triggers away, as somebody with the owner's rights can."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db, db:
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                db.execute(f"DROP TRIGGER {name}")
    else:
        execute("DROP FUNCTION azu_keep CASCADE")


REFUSED = [
    "UPDATE transactions SET at = 0 WHERE seq = 1",
    "DELETE FROM transactions WHERE seq = 1",
    "UPDATE postings SET amount = '7' WHERE seq = 1",
    "DELETE FROM postings",
    "UPDATE deposits SET wallet = 'mine'",
    "DELETE FROM deposits",
    "UPDATE jobs SET cost = '0'",
    "DELETE FROM jobs",
    "UPDATE stages SET earned = '99', state = 'credited'",
    "DELETE FROM stages",
    "DELETE FROM balances",
    "DELETE FROM head",
    "UPDATE head SET seq = 1",
    "UPDATE head SET currency = 'lamports'",
    "DELETE FROM reservations",
    "UPDATE reservations SET state = 'open' WHERE job_id = 'released'",
    "UPDATE reservations SET captured = '1' WHERE job_id = 'job0'",
    "UPDATE reservations SET amount = '1' WHERE job_id = 'job1'",
    "UPDATE reservations SET wallet = 'mine' WHERE job_id = 'job1'",
    "DELETE FROM payouts",
    "UPDATE payouts SET state = 'planned' WHERE payout_id = 'p0'",
    "UPDATE payouts SET state = 'planned' WHERE payout_id = 'p1'",
    "UPDATE payouts SET amount = '11' WHERE payout_id = 'p2'",
    "UPDATE payouts SET address = 'mine' WHERE payout_id = 'p2'",
    "UPDATE payout_transactions SET raw = 'x'",
    "DELETE FROM payout_transactions",
    "UPDATE balances SET balance = '-1' WHERE account = 'client:0xA11CE'",
]

# What is done, and what of it is found.
TAMPERED = [
    ("UPDATE transactions SET at = 0 WHERE seq = 3", "transaction 3: its digest is another"),
    ("UPDATE transactions SET kind = 'gift' WHERE seq = 2", "transaction 2: its digest is another"),
    ("UPDATE postings SET amount = '999999' WHERE seq = 1 AND number = 1", "transaction 1: .* do not add up to zero"),
    ("UPDATE postings SET account = 'client:mine' WHERE seq = 1 AND number = 1", "deposit:main:tx0: the postings"),
    ("DELETE FROM postings WHERE seq = 4", "transaction 4: its digest is another"),
    ("UPDATE balances SET balance = '77' WHERE account = 'client:0xA11CE'", "client:0xA11CE: the balance is 77"),
    ("UPDATE balances SET kind = 'free' WHERE account = 'platform'", "platform: its kind is another"),
    ("DELETE FROM balances WHERE account = 'platform'", "platform: the balance is 0"),
    ("UPDATE head SET seq = seq - 1", "head: it does not name"),
    ("UPDATE reservations SET amount = '7000' WHERE job_id = 'job1'", "reserve:job1: the postings"),
    ("UPDATE reservations SET state = 'open' WHERE job_id = 'released'", f"reserved:{WALLET}: open reservations"),
    ("UPDATE reservations SET state = 'released' WHERE job_id = 'job1'", "close:job1: the transaction is missing"),
    ("DELETE FROM reservations WHERE job_id = 'job1'", "reserve:job1: nothing tells what"),
    ("UPDATE reservations SET captured = '1' WHERE job_id = 'job0'", "job job0: it is settled, and its reservation"),
    ("UPDATE key_spending SET spent = '0'", "key key: it has spent 1300, not 0"),
    ("UPDATE deposits SET wallet = 'mine' WHERE txid = 'tx1'", "deposit:main:tx1: the postings"),
    ("DELETE FROM deposits WHERE txid = 'tx1'", "deposit:main:tx1: nothing tells what"),
    ("UPDATE jobs SET cost = '1' WHERE job_id = 'gift'", "close:gift: the postings"),
    ("UPDATE stages SET earned = '1' WHERE job_id = 'late' AND stage = 0", "late:late: the postings"),
    ("UPDATE reservations SET state = 'settled' WHERE job_id = 'late'", "job late: it is settled late"),
    ("UPDATE stages SET earned = '1' WHERE job_id = 'job0' AND stage = 0", "close:job0: the postings"),
    ("UPDATE stages SET state = 'credited' WHERE job_id = 'job0' AND stage = 1", "close:job0: the postings"),
    ("UPDATE stages SET peer_id = 'mine' WHERE job_id = 'gift'", "close:gift: the postings"),
    ("UPDATE stages SET token_layers = 1 WHERE job_id = 'gift' AND stage = 0", "job gift: stage 0 has 1 token-layers"),
    ("DELETE FROM stages WHERE job_id = 'gift'", "close:gift: the postings"),
    ("UPDATE payouts SET amount = '1' WHERE payout_id = 'p0'", "payout:p0:confirmed: the postings"),
    ("UPDATE payouts SET fee = '1' WHERE payout_id = 'p0'", "payout:p0:confirmed: the postings"),
    ("UPDATE payouts SET state = 'failed' WHERE payout_id = 'p2'", "payout:p2:failed: the transaction is missing"),
    ("UPDATE payouts SET state = 'planned' WHERE payout_id = 'p1'", "payout:p1:failed: nothing tells what"),
    ("DELETE FROM payouts WHERE payout_id = 'p2'", f"paying:{PEERS[0]}: payouts under way"),
]


async def test_the_database_keeps_what_is_written(url: str) -> None:
    await fill(url)
    execute = editor(url)
    for statement in REFUSED:
        with pytest.raises((sqlite3.IntegrityError, psycopg.Error)):
            execute(statement)
    if url.startswith("postgresql"):
        with pytest.raises(psycopg.Error, match="keeps what is written"):
            execute("TRUNCATE transactions CASCADE")
    async with opened(url):  # where all is well
        pass


async def test_tampering_is_found(tmp_path: Path) -> None:
    original = tmp_path / "original.sqlite3"
    await fill(f"sqlite:///{original}")
    for number, (statement, finding) in enumerate(TAMPERED):
        copied = shutil.copy(original, tmp_path / f"{number}.sqlite3")
        url = f"sqlite:///{copied}"
        disarm(url, editor(url))
        editor(url)(statement)
        assert_found(url, statement, finding)


async def test_tampering_is_found_in_postgresql(postgres: Server) -> None:
    url = postgres.url()
    await fill(url)
    disarm(url, editor(url))
    for statement, finding in TAMPERED[2], TAMPERED[6], TAMPERED[15]:
        editor(url)(statement)
        assert_found(url, statement, finding)


async def test_a_copy_is_the_same(url: str, postgres: Server, tmp_path: Path) -> None:
    """From each kind into each kind; a target that has a ledger is left alone."""
    await fill(url)
    for target in postgres.url(), f"sqlite:///{tmp_path / 'copy.sqlite3'}":
        with closing(Database(url)) as source, closing(Database(target)) as copied, source.reading() as connection:
            copy_ledger(connection, copied)
            assert copied.read(verify) == []
            assert copied.read(everything) == everything(connection)
            with pytest.raises(InputError) as raised:
                copy_ledger(connection, copied)
            assert raised.value.code == "ledger_not_empty"
    async with opened(target) as ledger:
        assert not (await ledger.deposit("c", "main", "tx0", WALLET, 1000)).is_new


def everything(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {
        table.name: sorted(tuple(row) for row in connection.execute(select(table))) for table in METADATA.sorted_tables
    }


async def test_a_transaction_that_was_cut_off_is_missed(tmp_path: Path) -> None:
    """All traces of the last deposit are gone but for the head, and then for that, too."""
    url = f"sqlite:///{tmp_path}/ledger.sqlite3"
    async with Ledger.open(url, currency="wei") as ledger:
        await ledger.deposit("c", "main", "tx0", WALLET, 10)
        await ledger.deposit("c", "main", "tx1", WALLET, 5)
    execute = editor(url)
    disarm(url, execute)
    for statement in ("DELETE FROM deposits WHERE seq = 2", "DELETE FROM postings WHERE seq = 2"):
        execute(statement)
    execute("DELETE FROM transactions WHERE seq = 2")
    execute("UPDATE balances SET balance = '10' WHERE account = 'client:0xA11CE'")
    execute("UPDATE balances SET balance = '-10' WHERE account = 'chain:c'")
    assert_found(url, "", "head: it does not name transaction 1 and its digest as the last")
    execute("UPDATE head SET seq = 1, digest = (SELECT digest FROM transactions)")
    # Only a digest that was kept elsewhere tells now, which is what `ledger verify` prints it for.
    assert findings(url) == []


def findings(url: str) -> list[str]:
    with closing(Database(url)) as database:
        return [f"{finding.where}: {finding.what}" for finding in database.read(verify)]


def assert_found(url: str, statement: str, finding: str) -> None:
    found = findings(url)
    assert any(re.match(finding, each) for each in found), (statement, found)
