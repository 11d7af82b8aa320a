"""The meter: what a job costs, who earns it, and that it is written down once and for good."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import InternalError
from azu.identity import Identity
from azu.tickets import JobTicket, Receipt, sign_receipt
from coordinator.meter import Meter, Receipts, read_job

WORKERS = [Identity(bytes([number]) * 32) for number in range(1, 4)]
ALICE, BOB, CAROL = WORKERS


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


def receipts(subject: JobTicket, *tokens: int | None) -> Receipts:
    """One receipt per stage with the positions that it states; None for a stage that sent none."""
    made: dict[int, tuple[bytes, Receipt]] = {}
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
            first_input="1" * 64,
            last_output="2" * 64,
            issued_at=0,
        )
        made[index] = (sign_receipt(WORKERS[index], receipt), receipt)
    return made


# --- reading


def test_the_last_token_is_sampled_but_never_run() -> None:
    report = read_job(ticket(), 3, receipts(ticket(), 7, 7, 7))
    assert (report.prompt_tokens, report.completion_tokens) == (5, 3)
    assert report.token_layers == (5 + 3 - 1) * 10
    assert report.cost == report.token_layers * 2
    assert [stage.tokens for stage in report.stages] == [7, 7, 7]
    assert [stage.token_layers for stage in report.stages] == [28, 35, 7]
    assert [stage.earned for stage in report.stages] == [56 * 8 // 10, 70 * 8 // 10, 14 * 8 // 10]
    assert [stage.state for stage in report.stages] == ["credited"] * 3


def test_one_token_costs_its_prompt() -> None:
    assert read_job(ticket(), 1, {}).token_layers == 5 * 10


def test_nothing_is_charged_where_no_token_came() -> None:
    report = read_job(ticket(), 0, receipts(ticket(), 5, 5, 5))
    assert (report.cost, report.token_layers) == (0, 0)
    assert [stage.earned for stage in report.stages] == [0, 0, 0]


@pytest.mark.parametrize(
    ("stated", "state"), [(None, "held"), (0, "held"), (6, "held"), (7, "credited"), (9, "credited")]
)
def test_a_stage_is_credited_once_it_confirms_the_count(stated: int | None, state: str) -> None:
    report = read_job(ticket(), 3, receipts(ticket(), 7, stated, 7))
    assert [stage.state for stage in report.stages] == ["credited", state, "credited"]
    # A receipt that states more earns no more: the coordinator's count is what pays.
    assert report.stages[1].tokens == 7
    assert report.stages[1].earned == 56


@given(st.integers(1, 1_000), st.integers(0, 100), st.integers(0, 10**9))
def test_stages_never_earn_more_than_was_charged(prompt: int, emitted: int, price: int) -> None:
    report = read_job(ticket(prompt_tokens=prompt, price=price), emitted, {})
    assert sum(stage.token_layers for stage in report.stages) == report.token_layers
    earned = sum(stage.earned for stage in report.stages)
    assert report.cost * 8 // 10 - len(report.stages) <= earned <= report.cost * 8 // 10


# --- writing


async def test_settling_again_changes_nothing(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "meter.sqlite")
    subject = ticket()
    first = await meter.settle(subject, 3, receipts(subject, 7, 7, 7))
    earned = meter.earnings()
    assert earned == {stage.peer_id: stage.earned for stage in first.stages}
    await meter.settle(subject, 3, receipts(subject, 7, 7, 7))
    await meter.settle(subject, 90, receipts(subject, 94, 94, 94))  # not even with other numbers
    assert meter.earnings() == earned
    assert _rows(tmp_path / "meter.sqlite", "SELECT COUNT(*) FROM jobs") == [(1,)]


async def test_jobs_add_up_and_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "meter.sqlite"
    expected: dict[str, int] = {}
    for number in range(3):
        subject = ticket(job_id=bytes([number]) * 16)
        report = await Meter(path).settle(subject, number + 1, receipts(subject, 100, 100, 100))
        for stage in report.stages:
            expected[stage.peer_id] = expected.get(stage.peer_id, 0) + stage.earned
    assert Meter(path).earnings() == expected


async def test_an_amended_job_is_a_row_of_its_own(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "meter.sqlite")
    for epoch in range(2):
        await meter.settle(ticket(epoch=epoch), 1, receipts(ticket(epoch=epoch), 5, 5, 5))
    assert meter.earnings()[ALICE.peer_id] == 2 * (5 * 4 * 2 * 8 // 10)


async def test_a_held_stage_is_written_down_but_not_credited(tmp_path: Path) -> None:
    path = tmp_path / "meter.sqlite"
    subject = ticket()
    given_in = receipts(subject, 7, None, 3)
    await Meter(path).settle(subject, 3, given_in)
    assert Meter(path).earnings() == {ALICE.peer_id: 44}
    rows = _rows(path, "SELECT peer_id, state, earned, receipt FROM stages ORDER BY stage")
    assert [(peer_id, state) for peer_id, state, _, _ in rows] == [
        (ALICE.peer_id, "credited"),
        (BOB.peer_id, "held"),
        (CAROL.peer_id, "held"),
    ]
    assert [receipt for *_, receipt in rows] == [given_in[0][0], None, given_in[2][0]]
    assert all(earned > 0 for _, _, earned, _ in rows)


async def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "meter.sqlite"
    meter = Meter(path)
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TRIGGER fail BEFORE INSERT ON stages WHEN NEW.stage = 2 BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(InternalError) as raised:
        await meter.settle(ticket(), 3, receipts(ticket(), 7, 7, 7))
    assert raised.value.code == "meter_failed"
    assert _rows(path, "SELECT COUNT(*) FROM jobs") == _rows(path, "SELECT COUNT(*) FROM stages") == [(0,)]
    with sqlite3.connect(path) as db:
        db.execute("DROP TRIGGER fail")
    await meter.settle(ticket(), 3, receipts(ticket(), 7, 7, 7))
    assert len(meter.earnings()) == 3


async def test_amounts_past_sqlites_integers_are_refused_as_a_fault_of_ours(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "meter.sqlite")
    with pytest.raises(InternalError) as raised:
        await meter.settle(ticket(price=2**62), 3, {})
    assert raised.value.code == "meter_failed"
    assert meter.earnings() == {}


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "meter.sqlite"
    path.write_bytes(b"this is no database, and long enough to tell" * 50)
    with pytest.raises(InternalError) as raised:
        Meter(path)
    assert str(path) in raised.value.message
    assert raised.value.remedy


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="nowhere"):
        Meter(tmp_path / "nowhere" / "meter.sqlite")


def _rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(os.fspath(path))
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()
