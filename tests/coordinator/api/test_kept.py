"""Whether a coordinator still leads a request: it asks only where it cannot be sure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from azu.accounts.kept import Lead
from azu.errors import NetworkError
from azu.ledger import Ledger
from azu.tickets import Sampling
from coordinator.api import kept as kept_module
from coordinator.api.kept import Kept
from coordinator.api.till import Till
from coordinator.generation import GenerationRequest, SampledToken
from coordinator.journal import Asked, Standing, Unfinished, row_of
from coordinator.meter import read_job
from tests.accounts.test_kept import House, two
from tests.coordinator.api.paying import ALICE, OWNER, provider
from tests.coordinator.api.twin import Twin, ticket_of
from tests.ledger.test_writer import held_up

ASKED = Asked(
    request_id="a" * 32,
    kind="stream",
    created=1,
    model_id="m",
    manifest="d" * 64,
    prompt=b"\1\0\0\0",
    max_tokens=3,
    stop_tokens=(),
    job_ids=(b"j" * 16,),
    samplings=(Sampling(),),
    stops=(),
    include_usage=False,
    account="",
    wallet="",
    key_id=None,
)


async def kept_by(house: House) -> Kept:
    lead = await house.kept.begin(row_of(ASKED, [Standing()]))
    return Kept(house.kept, ASKED, lead=lead)


async def test_it_knows_while_its_lease_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(f"sqlite:///{tmp_path / 'ledger'}") as (one, other):
        kept = await kept_by(one)
        other.take_for_gone(OWNER)
        assert await other.kept.claim(ASKED.request_id) is not None
        assert await kept.leads(), "it does not ask: others would have had to wait for its lease to end"
        monkeypatch.setattr("azu.accounts.presence.LEASE_S", 0.0)
        assert not await kept.leads()
        monkeypatch.undo()
        assert not await kept.leads(), "it does not forget that"


async def test_it_asks_once_others_had_taken_it_for_gone(tmp_path: Path) -> None:
    async with two(f"sqlite:///{tmp_path / 'ledger'}") as (one, other):
        kept = await kept_by(one)
        other.take_for_gone(OWNER)
        assert await other.kept.claim(ASKED.request_id) is not None
        await one.presence.confirm()  # its next beat
        assert not await kept.leads()


async def test_what_it_notes_tells_it_too(tmp_path: Path, twin: Twin) -> None:
    async with two(f"sqlite:///{tmp_path / 'ledger'}") as (one, other):
        kept = await kept_by(one)
        request = GenerationRequest(twin.served[0], (1,), 3, Sampling(), (), job_id=b"j" * 16)
        assert await kept.note(0, ticket_of(request, 2), ())
        other.take_for_gone(OWNER)
        claimed = await other.kept.claim(ASKED.request_id)
        assert claimed is not None
        assert claimed.lead == Lead(ASKED.request_id, 2)
        assert Standing.from_cbor(claimed.standings[0]).job_ticket() == ticket_of(request, 2)
        assert not await kept.note(0, ticket_of(request, 2), ())
        assert not await kept.leads()


async def test_who_leads_no_more_gives_nothing_back(
    tmp_path: Path, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put aside is for whoever leads the job now to settle."""
    async with provider("hyperliquid") as chain, two(f"sqlite:///{tmp_path / 'ledger'}") as (one, other):
        await one.ledger.deposit("hyperliquid", chain.chain, "0x1", ALICE.address, 10**18)
        kept = await kept_by(one)
        asked = GenerationRequest(twin.served[0], (1,), 3, Sampling(), (), wallet=ALICE.address, job_id=b"j" * 16)

        async def fail(kept: Kept, asked: GenerationRequest, *, is_claimed: bool) -> None:
            async with Till(one.ledger, chain, 2).reserved([asked], kept):
                if is_claimed:
                    other.take_for_gone(OWNER)
                    assert await other.kept.claim(ASKED.request_id) is not None
                    monkeypatch.setattr("azu.accounts.presence.LEASE_S", 0.0)
                raise NetworkError("its stages have gone over to the other one")

        with pytest.raises(NetworkError):
            await fail(kept, asked, is_claimed=True)
        aside = await one.ledger.balance(f"reserved:{ALICE.address}")
        assert aside > 0
        with pytest.raises(NetworkError):
            await fail(Kept(one.kept, ASKED), replace(asked, job_id=b"k" * 16), is_claimed=False)
        assert await one.ledger.balance(f"reserved:{ALICE.address}") == aside, "its own is given back, and no other"


async def test_while_the_database_is_away_jobs_go_on_and_end(tmp_path: Path, twin: Twin) -> None:
    """What was written before counts until it is back."""
    request = GenerationRequest(twin.served[0], (1,), 3, Sampling(), (), job_id=b"j" * 16)
    asked = ASKED.model_copy(update={"job_ids": (b"j" * 16, b"k" * 16), "samplings": (Sampling(), Sampling())})
    async with Ledger.open(tmp_path / "ledger", currency="wei", owner=OWNER) as ledger:
        kept = Kept(House(ledger).kept, asked)
        assert await kept.note(0, ticket_of(request, 2), ())
    assert await kept.note(0, ticket_of(request, 3), ())
    await kept.note_end(0, [SampledToken(7, "length")], read_job(ticket_of(request, 3), (1,), (7,), {}))
    assert await kept.leads()


async def test_a_ticket_waits_for_the_database_while_others_may_lead_the_job(
    tmp_path: Path, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "_ASK_S", 0.1)
    monkeypatch.setattr(kept_module, "_LOOK_S", 0.1)
    request = GenerationRequest(twin.served[0], (1,), 3, Sampling(), (), job_id=b"j" * 16)
    answers: list[bool] = []

    async def note(price: int) -> None:
        answers.append(await kept.note(0, ticket_of(request, price), ()))

    async with two(f"sqlite:///{tmp_path / 'ledger'}") as (one, _), trio.open_nursery() as nursery:
        kept = await kept_by(one)
        await note(2)
        async with held_up(one.ledger, nursery):
            with trio.fail_after(10):
                await note(2)  # what else is noted with it waits for nothing
            nursery.start_soon(note, 3)
            await trio.sleep(0.5)
            assert answers == [True, True]
        with trio.fail_after(10):
            while len(answers) < 3:
                await trio.sleep(0.01)
        assert answers[-1]


async def test_while_the_database_is_away_it_leads_what_it_led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(f"sqlite:///{tmp_path / 'ledger'}") as (one, _):
        kept = await kept_by(one)
    monkeypatch.setattr("azu.accounts.presence.LEASE_S", 0.0)
    assert await kept.leads()


async def test_a_stream_that_never_ran_here_is_left_to_the_next_one(tmp_path: Path, twin: Twin) -> None:
    """Its client hangs up as it comes: what is put aside stays so, for whoever ends the stream."""
    async with provider("hyperliquid") as chain, two(f"sqlite:///{tmp_path / 'ledger'}") as (one, _):
        await one.ledger.deposit("hyperliquid", chain.chain, "0x1", ALICE.address, 10**18)
        asked = GenerationRequest(twin.served[0], (1,), 3, Sampling(), (), wallet=ALICE.address, job_id=b"j" * 16)
        kept, till = await kept_by(one), Till(one.ledger, chain, 2)
        async with till.reserved([asked], kept):
            aside = await one.ledger.balance(f"reserved:{ALICE.address}")
        await kept._journal.let_go(Lead(ASKED.request_id))
        claimed = await one.kept.claim(ASKED.request_id)
        assert claimed is not None
        kept = Kept.of(one.kept, Unfinished.of(claimed))
        with trio.CancelScope() as client:
            client.cancel()
            async with till.reserved([asked], kept):
                raise AssertionError("it runs")
        await kept.close()
        assert 0 < aside == await one.ledger.balance(f"reserved:{ALICE.address}")
        assert [each.leader for each in await one.kept.waiting()] == [None]
