"""10,000 jobs at once, by two coordinators on one PostgreSQL: it balances."""

from __future__ import annotations

import trio

from azu.ledger import Closed, Ledger, Reserved, Shortfall
from azu.ledger.accounts import PLATFORM, client, reserved
from tests.ledger.books import FOREVER, ended, opened
from tests.ledger.postgres import Server

JOBS = 10_000
WALLETS = 50
COST, MOST = 60, 100


async def test_ten_thousand_jobs_at_once(postgres: Server) -> None:
    url = postgres.url()
    ends: list[Closed | Shortfall] = []

    async def run(ledger: Ledger, number: int) -> None:
        job_id, wallet = f"job{number}", f"wallet{number % WALLETS}"
        reservation = await ledger.reserve(job_id, wallet, MOST, expires_at=FOREVER)
        if isinstance(reservation, Reserved):
            closed = await ledger.settle(ended(job_id, COST)) if number % 5 else await ledger.release(job_id)
            assert isinstance(closed, Closed)
            ends.append(closed)
        else:
            assert isinstance(reservation, Shortfall)
            ends.append(reservation)

    async with opened(url) as one, opened(url, owner="another") as two:
        for number in range(WALLETS):
            # So much that some of the jobs find nothing left.
            await one.deposit("c", "main", f"tx{number}", f"wallet{number}", JOBS // WALLETS * COST // 2)
        async with trio.open_nursery() as nursery:
            for number in range(JOBS):
                nursery.start_soon(run, (one, two)[number % 2], number)
        assert len(ends) == JOBS
        charged = sum(end.captured for end in ends if isinstance(end, Closed))
        assert 0 < charged < JOBS * COST
        left = [await one.balance(client(f"wallet{number}")) for number in range(WALLETS)]
        assert sum(left) + charged == JOBS * COST // 2
        assert sum((await one.balances("worker")).values()) + await one.balance(PLATFORM) == charged
        assert [await one.balance(reserved(f"wallet{number}")) for number in range(WALLETS)] == [0] * WALLETS
