"""The short form of benchmarks/churn.py: workers come and go, some without a word, and the swarm knows who is there."""

from __future__ import annotations

import trio

from benchmarks.churn import Options, churn

LIMIT = 200.0  # seconds; only keeps a hung test from hanging the run
NODES, PER_PROCESS = 12, 3
MINUTES = 0.1
RATE = 2 * PER_PROCESS / NODES / MINUTES  # so that it goes through one period: a process dies, and as many leave


async def test_a_swarm_whose_workers_come_and_go() -> None:
    with trio.fail_after(LIMIT):
        result = await churn(Options(NODES, MINUTES, RATE, PER_PROCESS, freeze=True))
    assert result.lookups, "nothing was looked up"
    assert result.found >= 0.9, result.failed
    assert len(result.gone(killed=True)) == PER_PROCESS
    assert result.gone(killed=False), "nobody left"
    assert result.is_settled, "the coordinator does not see exactly those that live"
