"""A swarm with a peer of every kind, as a process of its own; ends when its stdin does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from azu.overlay import open_overlay
from azu.records import WORKERS_KEY, WorkerRecord
from tests.dht.records import MANIFEST, coordinator, held, identity, offer, worker
from tests.dht.swarm import EVIL, ROOT, a_swarm, config, publish, surroundings

__all__ = ["COORDINATOR", "DEAD", "EARLY", "EVERYBODY", "EXPIRED", "GONE", "HOSTILE", "HOUR", "ME", "RELAYED", "SILENT"]

HOUR = 4_000  # seconds, a little long: so that "4 h ago" stays true on a slow machine

# Peer ids. Those of EXPIRED and EARLY answer, though their records are out of force; DEAD, GONE and SILENT do not.
ME, COORDINATOR, HOSTILE, EXPIRED, EARLY, DEAD, GONE, SILENT = (identity(number).peer_id for number in range(1, 9))
STRANGER = identity(50).peer_id
RELAYED = f"/ip4/192.0.2.9/tcp/4001/p2p/{STRANGER}/p2p-circuit/p2p/{HOSTILE}"  # an address that HOSTILE claims
EVERYBODY = (ME, COORDINATOR, HOSTILE, EXPIRED, EARLY, DEAD, GONE, SILENT)


@dataclass(frozen=True)
class Lively:
    """The running swarm. addrs: of each peer that answers, and of those that did."""

    bootstrap_id: str
    address: str
    addrs: Mapping[str, list[str]]


@contextmanager
def lively_swarm() -> Iterator[Lively]:
    """Start it, and end it."""
    command = [sys.executable, "-m", "tests.dht.lively"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=surroundings()
    ) as process:
        assert process.stdout is not None
        yield Lively(**json.loads(process.stdout.readline()))


async def main() -> None:
    """Run it."""
    now = int(time.time())
    mine = held(0, 12), held(3, 20, "cached"), held(0, 9, manifest="cd" * 32)
    claims = {"agent": EVIL, "device": EVIL, "payout_address": EVIL, "addrs": (RELAYED, EVIL)}
    records = (
        worker(1, *mine, now=now, addrs=()),
        coordinator(2, offer(), now=now, addrs=()),
        worker(3, held(12, 14, "loading"), now=now, **claims),
        worker(4, held(0, 30), now=now - 4 * HOUR, addrs=()),
        coordinator(5, now=now + HOUR, addrs=()),
    )
    async with a_swarm(*records, limit=float("inf")) as swarm:
        for peer in (*swarm.peers[:2], swarm.meeting_point):
            await peer.provide(bytes.fromhex(MANIFEST))
        addrs = {peer.peer_id: peer.addrs for peer in swarm.peers}
        addrs[DEAD] = await leave(swarm.address, 6, worker(6, now=now - 4 * HOUR), MANIFEST)
        addrs[GONE] = await leave(swarm.address, 7, worker(7, now=now, expires_at=now + 4 * HOUR))
        addrs[SILENT] = await leave(swarm.address, 8, None)
        print(json.dumps(Lively(swarm.meeting_point.peer_id, swarm.address, addrs).__dict__), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def leave(address: str, number: int, record: WorkerRecord | None, *models: str) -> tuple[str, ...]:
    """Join, announce, and be gone."""
    async with open_overlay(config(number)) as peer:
        await peer.bootstrap([address])
        if record is None:
            await peer.provide(WORKERS_KEY)
        else:
            await publish(peer, number, record.model_copy(update={"addrs": peer.addrs}), *models)
        return peer.addrs


if __name__ == "__main__":
    trio.run(main)
