"""`azu-coordinator ledger`: what it prints, and that it leaves the ledger as it is."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from azu.ledger import Earning, EndedJob, Ledger
from coordinator.cli import main

WORKER = "12D3KooWorker"


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A data folder whose ledger has a deposit, a reservation and a settlement."""
    earning = Earning(WORKER, 0, 4, 7, 28, 16, "credited")
    async with Ledger.open(tmp_path / "ledger.sqlite3", currency="units") as ledger:
        await ledger.deposit("none", "test", "tx", "w", 100)
        await ledger.reserve("job", "w", 50, expires_at=2**40)
        await ledger.settle(EndedJob("job", 0, "m", 5, 3, 28, 20, (earning,)))
    return tmp_path


def run(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["ledger", *words, "--data-dir", str(folder)])


async def test_a_ledger_that_adds_up(folder: Path) -> None:
    done = run(folder, "verify")
    assert done.exit_code == 0
    assert "3 transactions in units, all adds up" in done.output
    facts = json.loads(run(folder, "verify", "--json").stdout)
    assert (facts["currency"], facts["seq"], facts["findings"]) == ("units", 3, [])
    assert facts["digest"] in done.output


async def test_one_that_does_not(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "ledger.sqlite3")) as db, db:
        db.execute("UPDATE balances SET balance = '1000' WHERE account = 'client:w'")
    done = run(folder, "verify")
    assert done.exit_code == 1
    assert "client:w: the balance is 1000, its postings add up to 80" in done.output
    assert "findings: 1" in done.output
    failed = run(folder, "verify", "--json")
    assert failed.exit_code == 1
    assert [finding["where"] for finding in json.loads(failed.stdout)["findings"]] == ["client:w"]


async def test_everything_comes_out(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run(folder, "export").stdout)))
    assert sum(int(row["amount"]) for row in rows) == 0
    assert {row["account"] for row in rows} == {"chain:none", "client:w", "reserved:w", f"worker:{WORKER}", "platform"}
    assert rows[0].keys() == {"seq", "time", "kind", "key", "account", "amount"}
    entries = [json.loads(line) for line in run(folder, "export", "--json").stdout.splitlines()]
    assert [(entry["seq"], entry["key"]) for entry in entries] == [
        (1, "deposit:test:tx"),
        (2, "reserve:job"),
        (3, "close:job"),
    ]
    assert entries[0]["postings"] == [{"account": "chain:none", "amount": -100}, {"account": "client:w", "amount": 100}]


async def test_a_statement(folder: Path) -> None:
    lines = run(folder, "statement", "client:w").stdout.splitlines()
    assert [line.split()[2:4] for line in lines[1:4]] == [["+100", "100"], ["-50", "50"], ["+30", "80"]]
    assert lines[-1] == "client:w has 80 units"
    facts = json.loads(run(folder, "statement", f"worker:{WORKER}", "--json").stdout)
    assert (facts["balance"], [line["amount"] for line in facts["lines"]]) == (16, [16])
    assert run(folder, "statement", "client:w", "--since", "2099-01-01").stdout == "client:w has 80 units\n"
    assert run(folder, "statement", "client:nobody").stdout == "client:nobody has 0 units\n"


async def test_a_copy(folder: Path, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path / 'copy.sqlite3'}"
    done = run(folder, "copy", target)
    assert done.exit_code == 0, done.output
    assert "3 transactions in units, all adds up" in done.output
    assert run(folder, "verify", "--ledger-url", target).output == done.output
    assert run(folder, "copy", target).exit_code == 2


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "verify")
    assert done.exit_code == 2
    assert "there is no ledger" in done.output
    assert list(tmp_path.iterdir()) == []  # and none is made
    sqlite3.connect(tmp_path / "ledger.sqlite3").execute("CREATE TABLE other (x)").connection.close()
    assert "there is no ledger of this version of azu" in run(tmp_path, "verify").output
    done = run(tmp_path, "verify", "--ledger-url", "mysql://somewhere/azu")
    assert done.exit_code == 2
    assert "a file of SQLite or a database of PostgreSQL" in done.output
    assert run(tmp_path, "statement", "client:w", "--since", "yesterday").exit_code == 2
    assert "ACCOUNT is missing" in run(tmp_path, "statement").output
