"""Whether a coordinator still leads a request: it asks only where it cannot be sure."""

from __future__ import annotations

from pathlib import Path

import pytest

from azu.accounts.kept import Lead
from azu.errors import NetworkError
from azu.tickets import Sampling
from coordinator.api.kept import Kept
from coordinator.api.till import Till
from coordinator.generation import GenerationRequest
from coordinator.journal import Asked, Standing, row_of
from tests.accounts.test_kept import House, two
from tests.coordinator.api.paying import ALICE, OWNER, provider
from tests.coordinator.api.twin import Twin, ticket_of

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

        async def fail(kept: Kept, *, is_claimed: bool) -> None:
            async with Till(one.ledger, chain, 2).reserved([asked], kept):
                if is_claimed:
                    other.take_for_gone(OWNER)
                    assert await other.kept.claim(ASKED.request_id) is not None
                    monkeypatch.setattr("azu.accounts.presence.LEASE_S", 0.0)
                raise NetworkError("its stages have gone over to the other one")

        with pytest.raises(NetworkError):
            await fail(kept, is_claimed=True)
        assert await one.ledger.balance(f"reserved:{ALICE.address}") > 0
        with pytest.raises(NetworkError):
            await fail(Kept(one.kept, ASKED), is_claimed=False)
        assert await one.ledger.balance(f"reserved:{ALICE.address}") == 0


async def test_while_the_database_is_away_it_leads_what_it_led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(f"sqlite:///{tmp_path / 'ledger'}") as (one, _):
        kept = await kept_by(one)
    monkeypatch.setattr("azu.accounts.presence.LEASE_S", 0.0)
    assert await kept.leads()
