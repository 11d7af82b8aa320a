"""Jobs that end while the ledger is away are settled once it is back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from azu.errors import InternalError
from azu.ledger import EndedJob, Ledger, Refusal
from azu.ledger.accounts import PLATFORM, client
from coordinator.meter import Meter
from coordinator.unsettled import Unsettled
from tests.accounts.test_kept import JOB, ROW, two
from tests.coordinator.api.paying import OWNER
from tests.coordinator.test_meter import receipts, settled, ticket
from tests.ledger.books import FOREVER, WALLET, ended

SUBJECT = ticket(price=2**62)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Ledger]:
    async with Ledger.open(folder / "ledger.sqlite3", currency="units") as ledger:
        yield ledger
        assert await ledger.verify() == []


def kept(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "unsettled").glob("*"))


async def end_a_job_while_away(folder: Path, *, is_free: bool = True) -> None:
    async with opened(folder) as ledger:
        pass  # a ledger that is closed takes nothing, and says so as one does whose database is away
    meter = Meter(ledger, is_free=is_free, unsettled=Unsettled(folder))
    report = await settled(meter, SUBJECT, 3, receipts(SUBJECT, 3, 7, 7, 7))
    assert report.completion_tokens == 3


async def test_a_job_that_ended_meanwhile_is_settled_once_and_in_full(tmp_path: Path) -> None:
    await end_a_job_while_away(tmp_path)
    assert kept(tmp_path) == [".cbor"]
    async with opened(tmp_path) as ledger:
        meter = Meter(ledger)
        for _ in range(2):
            await Unsettled(tmp_path).settle(meter.settle_ended)
        assert kept(tmp_path) == []
        report = await settled(meter, SUBJECT, 3, receipts(SUBJECT, 3, 7, 7, 7))
        assert await meter.earnings() == {stage.peer_id: stage.earned for stage in report.stages}
        assert len(await ledger.export()) == 1


async def test_it_waits_for_as_long_as_the_ledger_is_away(tmp_path: Path) -> None:
    await end_a_job_while_away(tmp_path)
    async with opened(tmp_path) as ledger:
        pass
    with pytest.raises(InternalError):
        await Unsettled(tmp_path).settle(Meter(ledger).settle_ended)
    assert kept(tmp_path) == [".cbor"]


async def test_what_cannot_be_settled_is_put_aside_and_holds_up_no_other(tmp_path: Path) -> None:
    await end_a_job_while_away(tmp_path)
    (tmp_path / "unsettled/00.cbor").write_bytes(b"\xff")
    async with opened(tmp_path) as ledger:
        paid_only = Meter(ledger, is_free=False)
        await Unsettled(tmp_path).settle(paid_only.settle_ended)
        assert await ledger.export() == []
    assert kept(tmp_path) == [".refused", ".refused"]


async def test_without_a_disk_it_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "unsettled").write_text("no folder")
    with pytest.raises(InternalError) as raised:
        await end_a_job_while_away(tmp_path)
    assert raised.value.code == "not_settled"


async def test_a_refused_job_is_not_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        meter = Meter(ledger, is_free=False, unsettled=Unsettled(tmp_path))
        with pytest.raises(InternalError):
            await settled(meter, SUBJECT, 3, receipts(SUBJECT, 3, 7, 7, 7))
    assert kept(tmp_path) == []


async def test_it_reads_what_it_writes(tmp_path: Path) -> None:
    """Each field, receipts and huge amounts among them."""
    await end_a_job_while_away(tmp_path)
    found: list[EndedJob] = []

    async def note(job: EndedJob) -> None:
        found.append(job)

    await Unsettled(tmp_path).settle(note)
    async with opened(tmp_path) as ledger:
        closed = await ledger.settle(found[0], is_free=True)
        assert not isinstance(closed, Refusal)
        assert closed.captured == found[0].cost == 7 * 10 * 2**62
    assert all(each.receipt for each in found[0].earnings)


async def test_what_another_coordinator_leads_is_left_until_that_ends_it(tmp_path: Path) -> None:
    """That one took the job for lost, since this one could not say that it had ended: nobody loses money by it."""
    async with two(f"sqlite:///{tmp_path / 'ledger.sqlite3'}") as (one, other):
        await one.ledger.deposit("none", "test", "1", WALLET, 1_000)
        await one.ledger.reserve(JOB, WALLET, 700, expires_at=FOREVER)
        await one.kept.begin(ROW)
        meter = Meter(one.ledger, is_free=False, unsettled=Unsettled(tmp_path))
        await Unsettled(tmp_path).keep(ended(JOB, 600))
        other.take_for_gone(OWNER)
        claimed = await other.kept.claim(ROW.request_id)
        assert claimed is not None
        await meter.settle_kept()
        assert (kept(tmp_path), await one.ledger.balances("worker")) == ([".cbor"], {})

        await other.ledger.release(JOB)
        await other.kept.forget(claimed.lead)
        await meter.settle_kept()
        assert kept(tmp_path) == []
        earned = sum((await one.ledger.balances("worker")).values())
        assert 0 < earned == -await one.ledger.balance(PLATFORM)
        assert await one.ledger.balance(client(WALLET)) == 1_000
        assert await one.ledger.verify() == []


async def test_a_folder_that_cannot_be_used_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "unsettled/00.cbor").mkdir(parents=True)
    async with opened(tmp_path) as ledger:
        with pytest.raises(InternalError, match="unsettled cannot be used"):
            await Meter(ledger, unsettled=Unsettled(tmp_path)).settle_kept()
