"""A coordinator that is killed in the middle of its writes, again and again: nothing is lost, nothing is done twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from random import Random

from azu.ledger import Database, Entry, reading, verify
from azu.ledger.accounts import FEES, client, reserved
from tests.ledger.books import WALLET
from tests.ledger.spender import COST, DEPOSIT, JOBS, TASKS

ROOT = Path(__file__).resolve().parents[2]
KILLS = 4
LIMIT = 120


def spender(url: str, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.ledger.spender", url, str(rounds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run_and_kill(url: str, after: int, pause: float) -> list[list[str]]:
    """Kill it a moment after it has said so many lines; what it said."""
    process = spender(url, KILLS)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.split())
        if len(said) == after:
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == -signal.SIGKILL
    process.stdout.close()
    return said


def test_killed_again_and_again(url: str) -> None:
    random = Random(7)
    told: set[str] = set()
    for _ in range(KILLS):
        said = run_and_kill(url, random.randrange(1, 400), random.random() / 50)
        told |= {" ".join(words[:2]) for words in said if len(words) > 1}
        with closing(Database(url)) as database:
            assert database.read(verify) == []
            assert told <= database.read(lambda connection: set(done(reading.entries(connection))))
    with spender(url, 1) as process:  # and now to the end of what a round is
        said_at_last, _ = process.communicate(timeout=LIMIT)
    assert said_at_last.splitlines()[-1] == "end"
    assert_all_was_done_once(url)


def done(entries: Iterable[Entry]) -> list[str]:
    """What the transactions show of what the spender says."""
    words = []
    for entry in entries:
        kind, _, rest = entry.key.partition(":")
        words.append(f"{kind} {rest.removeprefix('main:')}")
        if entry.key.endswith(":confirmed"):
            words.append(f"paid {rest.removesuffix(':confirmed')}")
    return words


def assert_all_was_done_once(url: str) -> None:
    """Each number of each task was done, some of later rounds too; each of them once."""
    with closing(Database(url)) as database, database.reading() as connection:
        assert verify(connection) == []
        entries = list(reading.entries(connection))
        keys = [entry.key for entry in entries]
        assert len(keys) == len(set(keys))
        wanted = {f"close:{task}-{number}" for task in range(TASKS) for number in range(JOBS)}
        assert wanted <= set(keys)
        deposits = sum(entry.kind == "deposit" for entry in entries)
        settled = sum(entry.kind == "settle" for entry in entries)
        open_now = sum(each.amount for each in reading.open_reservations(connection))
        assert reading.balance(connection, reserved(WALLET)) == open_now
        assert reading.balance(connection, client(WALLET)) == deposits * DEPOSIT - settled * COST - open_now
        assert reading.balance(connection, FEES) == -sum(entry.kind == "payout confirmed" for entry in entries)
