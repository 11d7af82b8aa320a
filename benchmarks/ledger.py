"""Jobs per second that a ledger writes: each is reserved and captured, for three workers, in two transactions.

    python -m benchmarks.ledger [--jobs 10000] [--at-once 512] [--ledgers 1] [--url postgresql://azu@/azu?host=/tmp/db]

Without --url, a new SQLite file in a temporary folder. All jobs are written by `--at-once` tasks, each of which waits
for its reservation to be on disk before it settles; with several ledgers, the tasks are spread over as many writers, as
with coordinators that share a database. At the end the ledger is verified.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from azu.economics import split
from azu.ledger import Closed, Earning, EndedJob, Ledger, Reserved

COST = 1_000
CLIENTS = 100
PEERS = [f"12D3KooWBenchmark{number}" for number in range(50)]


def ended(job_id: str, number: int) -> EndedJob:
    peers = (PEERS[(number + step) % len(PEERS)] for step in range(3))
    earned = split(COST // 3).worker
    earnings = tuple(Earning(peer, at, at + 10, 5, 50, earned, "credited") for at, peer in enumerate(peers))
    return EndedJob(job_id, 0, "c" * 64, 3, 3, 150, COST, earnings)


async def work(ledger: Ledger, jobs: Iterator[int], waits: list[float]) -> None:
    for number in jobs:
        job_id = f"{os.getpid()}-{number}"
        begun = time.perf_counter()
        reserved = await ledger.reserve(job_id, f"wallet{number % CLIENTS}", COST + 500, expires_at=2**40)
        waits.append(time.perf_counter() - begun)
        assert isinstance(reserved, Reserved)
        assert isinstance(await ledger.settle(ended(job_id, number)), Closed)


async def main(url: str, jobs: int, at_once: int, ledgers: int) -> dict[str, float | int | str]:
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(Ledger.open(url, currency="units")) for _ in range(ledgers)]
        for number in range(CLIENTS):
            await opened[0].deposit("none", "benchmark", f"{os.getpid()}-{number}", f"wallet{number}", 10**9)
        numbers, waits = iter(range(jobs)), list[float]()
        begun, cpu = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as nursery:
            for number in range(at_once):
                nursery.start_soon(work, opened[number % ledgers], numbers, waits)
        took, cpu = time.perf_counter() - begun, time.process_time() - cpu
        findings = await opened[0].verify()
        assert findings == [], findings[:3]
    waits.sort()
    return {
        "database": url.partition(":")[0],
        "ledgers": ledgers,
        "jobs": jobs,
        "at_once": at_once,
        "seconds": round(took, 2),
        "cpu_seconds": round(cpu, 2),
        "jobs_per_second": round(jobs / took),
        "median_wait_ms": round(waits[len(waits) // 2] * 1000, 1),
        "longest_wait_ms": round(waits[-1] * 1000, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=512)
    parser.add_argument("--ledgers", type=int, default=1)
    parser.add_argument("--url")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.url or f"sqlite:///{Path(folder) / 'ledger.sqlite3'}"
        print(json.dumps(trio.run(main, place, arguments.jobs, arguments.at_once, arguments.ledgers)))
