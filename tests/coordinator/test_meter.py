"""The meter: what a job costs, who earns it, and that it is written down once and for good."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.crossings import NOTHING, Crossing, token_crossing
from azu.errors import InternalError
from azu.identity import Identity
from azu.ledger import Ledger
from azu.ledger.accounts import FREE
from azu.tickets import JobTicket, Receipt, sign_receipt
from coordinator.agreement import Handover, word_of
from coordinator.generation import JobReport
from coordinator.meter import Meter, Receipts, read_job
from coordinator.old_meter import take_over_meter

WORKERS = [Identity(bytes([number]) * 32) for number in range(1, 4)]
ALICE, BOB, CAROL = WORKERS
DAVE = Identity(bytes([4]) * 32)


def ticket(**changes: Any) -> JobTicket:
    fields: dict[str, Any] = {
        "job_id": b"j" * 16,
        "epoch": 0,
        "manifest": "c" * 64,
        "n_layers": 10,
        "stages": [
            {"peer_id": ALICE.peer_id, "start": 0, "end": 4},
            {"peer_id": BOB.peer_id, "start": 4, "end": 9},
            {"peer_id": CAROL.peer_id, "start": 9, "end": 10},
        ],
        "dtype": "float16",
        "prompt_tokens": 5,
        "max_tokens": 100,
        "stop_tokens": (),
        "sampling": {},
        "price": 2,
        "begun_at": 0,
        "issued_at": 0,
        "expires_at": 1,
        "coordinator": ALICE.peer_id,
    }
    return JobTicket.model_validate(fields | changes)


PROMPT = (3, 4, 5, 6, 7)


def answer(count: int) -> tuple[int, ...]:
    return tuple(range(10, 10 + count))


def receipts(subject: JobTicket, counted: int, *tokens: int | None) -> Receipts:
    """Receipts that agree, one per stage with the positions that it states; None for a stage that sent none."""
    made: dict[int, tuple[bytes, Receipt]] = {}
    positions = subject.positions(counted)
    last = len(subject.stages) - 1
    for index, count in enumerate(tokens):
        if count is None:
            continue
        entry = subject.stages[index]
        receipt = Receipt(
            job_id=subject.job_id,
            epoch=subject.epoch,
            stage=index,
            peer_id=entry.peer_id,
            start=entry.start,
            end=entry.end,
            tokens=count,
            received=seam(index, positions) if index else token_crossing(0, (*PROMPT, *answer(counted))[:positions]),
            sent=seam(index + 1, positions) if index < last else token_crossing(len(PROMPT), answer(counted)),
            issued_at=0,
        )
        made[index] = (sign_receipt(WORKERS[index], receipt), receipt)
    return made


def seam(index: int, positions: int) -> Crossing:
    """What the stages at both sides of a seam say of it."""
    return Crossing(start=0, end=positions, digest=f"{index:064x}") if positions else NOTHING


def settled(meter: Meter, subject: JobTicket, counted: int, given: Receipts) -> Awaitable[JobReport]:
    return meter.settle(subject, PROMPT, answer(counted), given)


# --- reading


def test_who_leaves_is_paid_up_to_there_and_the_heir_from_there_on() -> None:
    """A word that a stage which stays has given then is as good as its receipt."""
    before = ticket()
    after = before.amended({1: DAVE.peer_id}, 0, {1: before.positions(2)})
    left = receipts(before, 2, 6, 6, 6)
    said = {index: word_of(left[index][1]) for index in (0, 2)}
    handover = Handover(before, 2, (1,), {1: left[1]}, said)
    report = read_job(after, PROMPT, answer(3), receipts(after, 3, 7, 7, 7), [handover])
    assert [(stage.peer_id, stage.tokens) for stage in report.stages] == [
        (ALICE.peer_id, 7), (DAVE.peer_id, 1), (CAROL.peer_id, 7), (BOB.peer_id, 6)
    ]  # fmt: skip
    assert {stage.state for stage in report.stages} == {"credited"}
    assert sum(stage.token_layers for stage in report.stages) == report.token_layers
    lies = {0: said[0]._replace(sent=seam(8, 6)), 2: said[2]}
    for words, reason in ((lies, "contradicted"), ({}, "unwitnessed"), (said, "")):
        handover = Handover(before, 2, (1,), {1: left[1]}, words)
        assert read_job(after, PROMPT, answer(3), receipts(after, 3, 7, 7, 7), [handover]).stages[3].reason == reason
    silent = read_job(after, PROMPT, answer(3), receipts(after, 3, 7, 7, 7), [Handover(before, 2, (1,), {}, said)])
    assert silent.stages[3].reason == "no_receipt"


def test_who_leaves_before_the_first_token_is_paid_nothing() -> None:
    after = ticket().amended({1: CAROL.peer_id}, 0, {1: 0})
    left = receipts(ticket(), 0, 5, 5, 5)
    report = read_job(
        after, PROMPT, answer(3), receipts(after, 3, 7, 7, 7), [Handover(ticket(), 0, (1,), {1: left[1]})]
    )
    assert [stage.tokens for stage in report.stages] == [7, 7, 7]


def test_the_last_token_is_sampled_but_never_run() -> None:
    report = read_job(ticket(), PROMPT, answer(3), receipts(ticket(), 3, 7, 7, 7))
    assert (report.prompt_tokens, report.completion_tokens) == (5, 3)
    assert report.token_layers == (5 + 3 - 1) * 10
    assert report.cost == report.token_layers * 2
    assert [stage.tokens for stage in report.stages] == [7, 7, 7]
    assert [stage.token_layers for stage in report.stages] == [28, 35, 7]
    assert [stage.earned for stage in report.stages] == [56 * 8 // 10, 70 * 8 // 10, 14 * 8 // 10]
    assert [stage.state for stage in report.stages] == ["credited"] * 3


def test_one_token_costs_its_prompt() -> None:
    assert read_job(ticket(), PROMPT, answer(1), {}).token_layers == 5 * 10


def test_nothing_is_charged_where_no_token_came() -> None:
    report = read_job(ticket(), PROMPT, (), receipts(ticket(), 0, 5, 5, 5))
    assert (report.cost, report.token_layers) == (0, 0)
    assert [(stage.earned, stage.state) for stage in report.stages] == [(0, "credited")] * 3


@pytest.mark.parametrize(("stated", "reason"), [(None, "no_receipt"), (0, "short"), (6, "short"), (7, ""), (9, "")])
def test_a_stage_is_credited_once_it_confirms_the_count(stated: int | None, reason: str) -> None:
    report = read_job(ticket(), PROMPT, answer(3), receipts(ticket(), 3, 7, stated, 7))
    assert [stage.reason for stage in report.stages] == ["", reason, ""]
    assert [stage.state for stage in report.stages] == ["credited", "held" if reason else "credited", "credited"]
    # A receipt that states more earns no more: the coordinator's count is what pays.
    assert report.stages[1].tokens == 7
    assert report.stages[1].earned == 56


@given(st.integers(1, 1_000), st.integers(0, 100), st.integers(0, 10**9))
def test_stages_never_earn_more_than_was_charged(prompt: int, emitted: int, price: int) -> None:
    report = read_job(ticket(prompt_tokens=prompt, price=price), range(prompt), answer(emitted), {})
    assert sum(stage.token_layers for stage in report.stages) == report.token_layers
    earned = sum(stage.earned for stage in report.stages)
    assert report.cost * 8 // 10 - len(report.stages) <= earned <= report.cost * 8 // 10


# --- writing


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with Ledger.open(tmp_path / "ledger.sqlite3", currency="units") as ledger:
        yield ledger
        assert await ledger.verify() == []


async def test_settling_again_changes_nothing(ledger: Ledger) -> None:
    meter = Meter(ledger)
    subject = ticket()
    first = await settled(meter, subject, 3, receipts(subject, 3, 7, 7, 7))
    earned = await meter.earnings()
    assert earned == {stage.peer_id: stage.earned for stage in first.stages}
    await settled(meter, subject, 3, receipts(subject, 3, 7, 7, 7))
    await settled(meter, subject, 90, receipts(subject, 90, 94, 94, 94))  # not even with other numbers
    await settled(meter, ticket(epoch=1), 3, receipts(ticket(epoch=1), 3, 7, 7, 7))
    assert await meter.earnings() == earned
    assert len(await ledger.export()) == 1


async def test_jobs_add_up(ledger: Ledger) -> None:
    expected: dict[str, int] = {}
    for number in range(3):
        subject = ticket(job_id=bytes([number]) * 16)
        report = await settled(Meter(ledger), subject, number + 1, receipts(subject, number + 1, 100, 100, 100))
        for stage in report.stages:
            expected[stage.peer_id] = expected.get(stage.peer_id, 0) + stage.earned
    assert await Meter(ledger).earnings() == expected
    assert await ledger.balance(FREE) == -sum(use.cost for use in await ledger.usage(""))


async def test_a_held_stage_is_written_down_but_not_credited(ledger: Ledger) -> None:
    subject = ticket()
    given_in = receipts(subject, 3, 7, None, 3)
    await settled(Meter(ledger), subject, 3, given_in)
    assert await Meter(ledger).earnings() == {ALICE.peer_id: 44}
    held = await ledger.held()
    assert [(each.peer_id, each.reason) for each in held] == [(BOB.peer_id, "no_receipt"), (CAROL.peer_id, "short")]
    assert [each.receipt for each in held] == [None, given_in[2][0]]
    assert await ledger.balances("held") == {each.peer_id: each.earned for each in held}


async def test_where_jobs_are_paid_for_one_that_is_not_reserved_is_a_bug(ledger: Ledger) -> None:
    with pytest.raises(InternalError) as raised:
        await settled(Meter(ledger, is_free=False), ticket(), 3, {})
    assert raised.value.code == "not_reserved"
    assert await ledger.export() == []


async def test_amounts_past_64_bits_are_counted(ledger: Ledger) -> None:
    report = await settled(Meter(ledger), ticket(price=2**62), 3, {})
    assert report.cost == 70 * 2**62
    assert await ledger.balance(FREE) == -report.cost


# --- what was written before there was a ledger

OLD_SCHEMA = """
CREATE TABLE jobs (
    job_id TEXT NOT NULL, epoch INTEGER NOT NULL, manifest TEXT NOT NULL, settled_at INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    token_layers INTEGER NOT NULL, cost INTEGER NOT NULL,
    PRIMARY KEY (job_id, epoch)
) STRICT;
CREATE TABLE stages (
    job_id TEXT NOT NULL, epoch INTEGER NOT NULL, stage INTEGER NOT NULL,
    peer_id TEXT NOT NULL, first_layer INTEGER NOT NULL, end_layer INTEGER NOT NULL,
    tokens INTEGER NOT NULL, token_layers INTEGER NOT NULL, earned INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('credited', 'held')), receipt BLOB,
    PRIMARY KEY (job_id, epoch, stage), FOREIGN KEY (job_id, epoch) REFERENCES jobs (job_id, epoch)
) STRICT;
"""


def old_meter(path: Path, jobs: int) -> dict[str, int]:
    """A file as azu wrote it before, one stage of each job held; what each peer had been credited."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(OLD_SCHEMA)
        for number in range(jobs):
            job = (f"{number // 2:032x}", number % 2)  # an amended job was a row of its own
            db.execute("INSERT INTO jobs VALUES (?, ?, 'm', ?, 5, 3, 70, 140)", (*job, 1_700_000_000 + number))
            for stage, worker in enumerate(WORKERS):
                state = "held" if worker is BOB else "credited"
                row = (stage, worker.peer_id, stage, stage + 1, 7, 7, 11 + stage, state, b"receipt")
                db.execute("INSERT INTO stages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*job, *row))
        query = "SELECT peer_id, SUM(earned) FROM stages WHERE state = 'credited' GROUP BY peer_id"
        return dict(db.execute(query).fetchall())


async def test_an_old_meter_is_taken_over_once(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "meter.sqlite"
    earned = old_meter(path, 600)
    kept = path.read_bytes()
    assert await take_over_meter(path, ledger) == 600
    assert await ledger.balances("worker") == earned
    assert await ledger.balances("held") == {BOB.peer_id: 12 * 600}
    assert await ledger.balance(FREE) == -140 * 600
    newest = (await ledger.usage("", limit=1))[0]
    assert (newest.settled_at, newest.cost) == (1_700_000_599, 140)
    assert not path.exists()
    assert path.with_name("meter.sqlite.imported").exists()
    assert await take_over_meter(path, ledger) == 0
    path.write_bytes(kept)  # as if it had been interrupted before the end
    assert await take_over_meter(path, ledger) == 600
    assert await ledger.balances("worker") == earned


async def test_an_old_meter_is_worth_nothing_in_a_coin(tmp_path: Path) -> None:
    path = tmp_path / "meter.sqlite"
    old_meter(path, 2)
    async with Ledger.open(tmp_path / "wei.sqlite3", currency="wei") as ledger:
        assert await take_over_meter(path, ledger) == 0
        assert await ledger.export() == []
    assert path.exists()


async def test_an_old_meter_that_cannot_be_read_is_named(tmp_path: Path, ledger: Ledger) -> None:
    path = tmp_path / "meter.sqlite"
    path.write_bytes(b"this is no database, and long enough to tell" * 50)
    with pytest.raises(InternalError) as raised:
        await take_over_meter(path, ledger)
    assert str(path) in raised.value.message
    assert raised.value.remedy
