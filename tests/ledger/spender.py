"""A process that does jobs against a ledger until it is killed, and says on stdout what it was told is done.

    python -m tests.ledger.spender URL ROUND

It does again what the rounds before may have left undone: all job, deposit and payout ids come from the same counting.
"""

from __future__ import annotations

import os
import sys

import trio

from azu.ledger import Closed, Ledger, Payout, Reserved
from tests.ledger.books import FOREVER, PEERS, WALLET, ended

TASKS = 24
JOBS = 12  # of each task in each round
DEPOSIT, COST, RESERVED = 1_000, 60, 100


def tell(*words: object) -> None:
    """At once and whole, so that a kill cannot take back what was said."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def spend(ledger: Ledger, task: int, number: int) -> None:
    name = f"{task}-{number}"
    deposited = await ledger.deposit("c", "main", name, WALLET, DEPOSIT)
    tell("deposit", name, deposited.amount)
    reservation = await ledger.reserve(name, WALLET, RESERVED, "key", expires_at=FOREVER)
    assert isinstance(reservation, Reserved)
    tell("reserve", name)
    if number % 4 == 0:
        closed = await ledger.release(name)
    else:
        closed = await ledger.settle(ended(name, COST, held=(0,) if number % 4 == 1 else ()))
    assert isinstance(closed, Closed)
    tell("close", name, closed.captured)
    if number % 4 == 2:
        await pay(ledger, name)


async def pay(ledger: Ledger, name: str) -> None:
    planned = await ledger.payout_plan(name, PEERS[2], "c", "a", 7)
    assert isinstance(planned, Payout)
    if planned.state == "planned":
        await ledger.payout_signed([name], f"tx-{name}", b"raw")
        await ledger.payout_sent([name])
    await ledger.payout_confirmed([name], f"tx-{name}", fee=1)
    tell("paid", name)


async def run(ledger: Ledger, task: int, rounds: int) -> None:
    for number in range(JOBS * rounds):
        await spend(ledger, task, number)


async def main(url: str, rounds: int) -> None:
    async with Ledger.open(url, currency="wei", owner="me", key_limits=lambda _, key_ids: {}) as ledger:
        tell("open")
        async with trio.open_nursery() as nursery:
            for task in range(TASKS):
                nursery.start_soon(run, ledger, task, rounds)
    tell("end")


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))
