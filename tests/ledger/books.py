"""What tests of the ledger share: names, jobs and a ledger that is checked at its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from azu.economics import split
from azu.ledger import Earning, EndedJob, Ledger

WALLET, OTHER = "0xA11CE", "0xB0B"
PEERS = ("12D3KooWPeer1", "12D3KooWPeer2", "12D3KooWPeer3")
FOREVER = 2**40


def ended(job_id: str, cost: int, *, held: tuple[int, ...] = (), **changes: Any) -> EndedJob:
    """A job of three stages that share its cost; those of these numbers are held."""
    shares = [cost // 2, cost // 3, cost - cost // 2 - cost // 3]
    earnings = tuple(
        Earning(peer_id, number, number + 1, 7, 7, split(share).worker, "held" if number in held else "credited")
        for number, (peer_id, share) in enumerate(zip(PEERS, shares, strict=True))
    )
    job = EndedJob(job_id, 0, "c" * 64, 5, 3, 21, cost, earnings)
    return EndedJob(**{name: changes.get(name, getattr(job, name)) for name in EndedJob.__slots__})


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Ledger]:
    """A ledger in wei, in which all has to be well at the end."""
    async with Ledger.open(url, **({"currency": "wei", "owner": "me"} | options)) as ledger:
        yield ledger
        assert await ledger.verify() == []
