"""`azu-coordinator ledger held` and `decide` on a ledger of jobs whose stages disagreed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from azu.identity import Identity
from azu.ledger import Earning, EndedJob, Ledger
from azu.ledger.accounts import FREE, PLATFORM, client, held, worker
from coordinator.cli import main

LIAR, *OTHERS = (Identity(bytes([number]) * 32).peer_id for number in range(1, 5))
WALLET = "0xA11CE"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three jobs, in each of which the liar and another worker disagree; two are a client's."""

    async def fill() -> None:
        async with Ledger.open(tmp_path / "ledger.sqlite3", currency="wei") as ledger:
            await ledger.deposit("none", "test", "1", WALLET, 10_000)
            for number, other in enumerate(OTHERS):
                job_id = f"{number:032x}"
                if number:
                    await ledger.reserve(job_id, WALLET, 2_000, expires_at=2**40)
                pair = ((LIAR, other), (other, LIAR))
                earnings = tuple(
                    Earning(peer, stage, stage + 1, 10, 10, 400, "held", b"receipt", f"contradicted {against}")
                    for stage, (peer, against) in enumerate(pair)
                )
                await ledger.settle(EndedJob(job_id, 0, "c" * 64, 5, 6, 20, 1_000, earnings), is_free=not number)

    trio.run(fill)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Callable[..., str]:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["ledger", *arguments, f"--data-dir={folder}"])
        assert result.exit_code == code, result.output
        return result.output

    return run


def balances(folder: Path, *accounts: str) -> list[int]:
    async def read() -> list[int]:
        async with Ledger.open(folder / "ledger.sqlite3", currency="wei") as ledger:
            assert await ledger.verify() == []
            return [await ledger.balance(account) for account in accounts]

    return trio.run(read)


Run = Callable[..., str]


def test_what_is_held_is_shown_and_who_disagrees_with_all(run: Run) -> None:
    lines = run("held").splitlines()
    assert lines[0].partition("Z  ")[2] == f"job {2:032x}, stage 0: 400 wei"
    assert lines[1:4] == [
        f"  worker   {LIAR}, layers 0-0",
        "  held     its receipt is contradicted by",
        f"           {OTHERS[2]}",
    ]
    assert lines[4 * 6 :] == [
        "2400 wei are held and wait for a decision",
        f"{LIAR} disagrees with 3 others: it may be the one that lies",
    ]
    facts = json.loads(run("held", "--json"))
    assert (facts["currency"], len(facts["held"])) == ("wei", 6)


def test_the_operator_decides_worker_by_worker(run: Run, folder: Path) -> None:
    assert len(run("decide", LIAR, "--for=client").splitlines()) == 3
    for other in OTHERS:
        run("decide", other, "--for", "worker")
    assert balances(folder, worker(LIAR), held(LIAR), client(WALLET), FREE) == [0, 0, 10_000 - 2_000 + 2 * 500, -500]
    assert balances(folder, *map(worker, OTHERS), PLATFORM) == [400, 400, 400, 300]
    assert run("held") == "0 wei are held and wait for a decision\n"
    assert run("held", "--decided").count("for the client") == 3
    assert "nothing is held" in run("decide", LIAR, "--for=worker", code=2)


def test_one_job_alone_can_be_decided_on(run: Run, folder: Path) -> None:
    assert run("decide", LIAR, "--for=worker", f"--job={1:032x}") == f"job {1:032x}, stage 0: 400 wei to {LIAR}\n"
    assert balances(folder, worker(LIAR), held(LIAR)) == [400, 800]


def test_bad_arguments_are_named(run: Run, tmp_path: Path) -> None:
    run("decide", "nobody", "--for=worker", code=2)
    run("decide", LIAR, "--for=me", code=2)
    run("decide", LIAR, code=2)
    result = CliRunner().invoke(main, ["ledger", "held", f"--data-dir={tmp_path / 'empty'}"])
    assert result.exit_code == 2
    assert "there is no ledger" in result.output
