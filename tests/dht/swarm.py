"""A swarm of real overlays in this process, and the real azu-dht program to look at it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import (
    COORDINATORS_KEY,
    VALIDATORS,
    WORKERS_KEY,
    CoordinatorRecord,
    WorkerRecord,
    coordinator_key,
    is_live,
    sign_coordinator_record,
    sign_worker_record,
    worker_key,
)
from tests.dht.records import identity

__all__ = ["EVIL", "LIMIT", "PROGRAM", "ROOT", "Swarm", "a_swarm", "assert_refused", "azu_dht", "config", "publish"]

ROOT = Path(__file__).parents[2]
LIMIT = 180.0  # seconds for one test's waiting; only a hang takes so long
EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]H100[/]\r\n\u202e"
PROGRAM = str(Path(sys.executable).with_name("azu-dht"))
MEETING_POINT = 1000  # number of the bootstrap node's identity


@dataclass(frozen=True)
class Swarm:
    """A bootstrap node, and a peer for each record, in their order."""

    meeting_point: Overlay
    peers: Sequence[Overlay]

    @property
    def address(self) -> str:
        """Where to join."""
        return self.meeting_point.addrs[0]


def surroundings() -> dict[str, str]:
    """This process's environment without azu's settings, nor a size of the terminal, which some test runners set."""
    ours = (name for name in os.environ if not name.startswith("AZU_") and name not in ("COLUMNS", "LINES"))
    return {name: os.environ[name] for name in ours}


async def azu_dht(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, at a pipe."""
    with trio.fail_after(LIMIT):
        done = await trio.run_process(
            [PROGRAM, *words],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=ROOT,
            env=surroundings() | {"FORCE_COLOR": "1"} | variables,  # a pipe gets no colours all the same
        )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def a_swarm(*records: WorkerRecord | CoordinatorRecord, limit: float = LIMIT) -> AsyncIterator[Swarm]:
    """A bootstrap node, and a peer for each record; identities are numbered from 1.

    A record without addresses gets its peer's. One that is in force stays so for longer than any test takes.
    """
    with trio.fail_after(limit):
        async with AsyncExitStack() as stack:
            meeting_point = await stack.enter_async_context(open_overlay(config(MEETING_POINT)))
            peers = []
            for number, record in enumerate(records, 1):
                peer = await stack.enter_async_context(open_overlay(config(number)))
                assert peer.peer_id == record.peer_id
                await peer.bootstrap(meeting_point.addrs)
                own: dict[str, object] = {"addrs": record.addrs or peer.addrs}
                if is_live(record, time.time()):
                    own["expires_at"] = record.expires_at + 10 * int(LIMIT)
                await publish(peer, number, record.model_copy(update=own))
                peers.append(peer)
            yield Swarm(meeting_point, peers)


def config(number: int, **changed: object) -> OverlayConfig:
    """A peer on loopback."""
    settings = {"listen": ("/ip4/127.0.0.1/tcp/0",), "validators": VALIDATORS} | changed
    return OverlayConfig(identity(number).seed, **settings)  # type: ignore[arg-type]


async def publish(peer: Overlay, number: int, record: WorkerRecord | CoordinatorRecord, *models: str) -> None:
    """Sign and store a peer's record, and announce the peer, and that it provides these manifests."""
    if isinstance(record, WorkerRecord):
        key, value, meeting = worker_key(peer.peer_id), sign_worker_record(identity(number), record), WORKERS_KEY
    else:
        value = sign_coordinator_record(identity(number), record)
        key, meeting = coordinator_key(peer.peer_id), COORDINATORS_KEY
    await peer.put_record(key, value)
    for each in (meeting, *(bytes.fromhex(model) for model in models)):
        await peer.provide(each)


def assert_refused(exit_code: int, stdout: str, stderr: str, code: int) -> None:
    """It ended with this exit code, and with one error that has a remedy."""
    assert exit_code == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "\n  remedy: " in stderr
    assert stderr.startswith("azu-dht: error: ")
