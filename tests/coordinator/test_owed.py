"""A worker is told what it is owed, signed, and keeps it; nobody is told of another's account."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

import node.owed
from azu.channel import Channel
from azu.errors import NetworkError, ProtocolError, TrustError
from azu.ledger import Earning, EndedJob, Ledger
from azu.overlay import Overlay, OverlayStream
from azu.statements import AccountStatement, open_statement, sign_statement
from azu.wire.messages import ACCOUNT, ACCOUNT_PROTOCOL, GetStatus, Status
from coordinator.owed import Owed
from node.book import Book
from node.cli import main
from node.owed import ask, keep_asking
from tests.node.real_stages import LIMIT, identity, peer
from tests.node.test_book import served

COORDINATOR, WORKER, OTHER = identity(99), identity(1), identity(2)
WEI = 10**19  # above 64 bits


@asynccontextmanager
async def peers() -> AsyncIterator[tuple[Overlay, Overlay]]:
    """A coordinator and a worker that are connected."""
    with trio.fail_after(LIMIT):
        async with peer(99) as coordinator, peer(1) as worker:
            await worker.connect(coordinator.peer_id, coordinator.addrs)
            yield coordinator, worker


async def fill(ledger: Ledger) -> None:
    """The worker is owed WEI, as much is held, on its way and paid, and the other one is owed something too."""
    earnings = tuple(
        Earning(peer_id, number, number + 1, 1, 1, amount, "held" if is_held else "credited", None, reason)
        for number, (peer_id, amount, is_held, reason) in enumerate(
            [
                (WORKER.peer_id, 3 * WEI, False, ""),
                (OTHER.peer_id, 7, False, ""),
                (WORKER.peer_id, WEI, True, "short"),
            ]
        )
    )
    await ledger.settle(EndedJob("a" * 32, 0, "c" * 64, 1, 1, 3, 5 * WEI, earnings), is_free=True)
    for payout_id in ("one", "two"):
        await ledger.payout_plan(payout_id, WORKER.peer_id, "none", "0xA11CE", WEI)
    await ledger.payout_signed(["one"], "tx", b"raw")
    await ledger.payout_sent(["one"])
    await ledger.payout_confirmed(["one"], "tx", 5)


async def test_a_worker_is_told_what_it_is_owed_and_shows_it(tmp_path: Path) -> None:
    async with (
        peers() as (coordinator, worker),
        Ledger.open(tmp_path / "ledger.sqlite3", currency="wei") as ledger,
    ):
        await fill(ledger)
        coordinator.handle(ACCOUNT_PROTOCOL, Owed(COORDINATOR, ledger).handle)
        book = Book(tmp_path)
        await book.write(served(coordinator=COORDINATOR.peer_id, earned=5 * WEI))
        await ask(worker, COORDINATOR.peer_id, WORKER.peer_id, book)
        signer, statement = open_statement(book.statements()[COORDINATOR.peer_id])
        assert (signer, statement.worker) == (COORDINATOR.peer_id, WORKER.peer_id)
        arguments = ["earnings", f"--data-dir={tmp_path}"]
        [mine] = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)["coordinators"]
        says = mine["says"]
        assert abs(says.pop("issued_at") - time.time()) < LIMIT
        assert says == {"currency": "wei", "owed": WEI, "held": WEI, "paying": WEI, "paid": WEI}
        page = CliRunner().invoke(main, arguments).output.splitlines()
        assert page[2].partition(": ")[2] == f"{WEI:,} owed, {WEI:,} held, {WEI:,} paying, {WEI:,} paid (wei)"


async def test_a_coordinator_is_asked_after_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.owed, "_AFTER_JOB_S", 0.01)
    asked = 0

    async def count(stream: OverlayStream) -> None:
        nonlocal asked
        asked += 1
        await owed.handle(stream)

    async with (
        peers() as (coordinator, worker),
        Ledger.open(tmp_path / "ledger.sqlite3", currency="wei") as ledger,
        trio.open_nursery() as nursery,
    ):
        owed, book = Owed(COORDINATOR, ledger), Book(tmp_path)
        coordinator.handle(ACCOUNT_PROTOCOL, count)
        nursery.start_soon(keep_asking, worker, WORKER.peer_id, book)
        for number in (1, 2):
            await book.write(served(number, coordinator=COORDINATOR.peer_id))
            while asked < number:
                await trio.sleep(0.01)
            await trio.sleep(0.2)  # it is left alone until the next one
            assert asked == number
        assert book.statements().keys() == {COORDINATOR.peer_id}
        nursery.cancel_scope.cancel()


async def test_who_never_earned_is_owed_nothing(tmp_path: Path) -> None:
    async with Ledger.open(tmp_path / "ledger.sqlite3", currency="wei") as ledger:
        statement = await Owed(COORDINATOR, ledger).statement(OTHER.peer_id)
        assert (statement.owed, statement.held, statement.paying, statement.paid) == ("0", "0", "0", "0")


@pytest.mark.parametrize(
    ("signer", "changes", "code"),
    [
        (OTHER, {}, "wrong_signer"),
        (OTHER, {"coordinator": OTHER.peer_id}, "wrong_signer"),
        (COORDINATOR, {"worker": OTHER.peer_id}, "not_for_me"),
        (COORDINATOR, {"issued_at": int(time.time()) + 1_000_000}, "from_the_future"),
    ],
)
async def test_other_statements_are_not_kept(
    tmp_path: Path, signer: object, changes: dict[str, object], code: str
) -> None:
    zero = dict.fromkeys(("owed", "held", "paying", "paid"), "0")
    fields = {"coordinator": COORDINATOR.peer_id, "worker": WORKER.peer_id, "currency": "wei", "issued_at": 1, **zero}

    async def lie(stream: OverlayStream) -> None:
        channel = Channel(stream, ACCOUNT)
        await channel.expect(GetStatus)
        await channel.send(Status(), sign_statement(signer, AccountStatement.model_validate(fields | changes)))  # type: ignore[arg-type]

    async with peers() as (coordinator, worker):
        coordinator.handle(ACCOUNT_PROTOCOL, lie)
        book = Book(tmp_path)
        with pytest.raises(TrustError) as raised:
            await ask(worker, COORDINATOR.peer_id, WORKER.peer_id, book)
        assert raised.value.code == code
        assert book.statements() == {}
        assert worker.statistics().violations == {COORDINATOR.peer_id: 1}


async def test_garbage_is_a_violation_and_silence_is_none(tmp_path: Path) -> None:
    async def garbage(stream: OverlayStream) -> None:
        channel = Channel(stream, ACCOUNT)
        await channel.expect(GetStatus)
        await channel.send(Status(), b"garbage")

    async with peers() as (coordinator, worker):
        with pytest.raises(NetworkError):  # an older coordinator does not know the protocol
            await ask(worker, COORDINATOR.peer_id, WORKER.peer_id, Book(tmp_path))
        assert worker.statistics().violations == {}
        coordinator.handle(ACCOUNT_PROTOCOL, garbage)
        with pytest.raises((TrustError, ProtocolError)):
            await ask(worker, COORDINATOR.peer_id, WORKER.peer_id, Book(tmp_path))
        assert worker.statistics().violations == {COORDINATOR.peer_id: 1}


async def test_an_older_statement_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for issued_at, envelope in ((5, b"five"), (4, b"four"), (6, b"six")):
        await book.keep_statement("boss", envelope, issued_at)
        assert book.statements() == {"boss": b"six" if issued_at == 6 else b"five"}
