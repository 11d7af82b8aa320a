"""The real azu-dht program against real peers on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import (
    COORDINATORS_KEY,
    VALIDATORS,
    WORKERS_KEY,
    CoordinatorRecord,
    WorkerRecord,
    coordinator_key,
    sign_coordinator_record,
    sign_worker_record,
    worker_key,
)
from tests.dht.records import MANIFEST, MODEL, coordinator, held, identity, offer, worker

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds for one test's waiting
EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]H100[/]\r\n\u202e"
PROGRAM = str(Path(sys.executable).with_name("azu-dht"))


async def azu_dht(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AZU_")}
    with trio.fail_after(LIMIT):
        done = await trio.run_process(
            [PROGRAM, *words],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=ROOT,
            env=environment | {"FORCE_COLOR": "1"} | variables,  # a pipe gets no colours all the same
        )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@asynccontextmanager
async def a_swarm(*records: WorkerRecord | CoordinatorRecord) -> AsyncIterator[Sequence[str]]:
    """A bootstrap node, whose addresses are returned, and a peer for each record; identities are numbered from 1."""
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            meeting_point = await stack.enter_async_context(open_overlay(_config(1000)))
            for number, record in enumerate(records, 1):
                peer = await stack.enter_async_context(open_overlay(_config(number)))
                assert peer.peer_id == record.peer_id
                await peer.bootstrap(meeting_point.addrs)
                await _publish(
                    peer, number, record.model_copy(update={"addrs": peer.addrs} if not record.addrs else {})
                )
            yield meeting_point.addrs


def _config(number: int) -> OverlayConfig:
    return OverlayConfig(identity(number).seed, ("/ip4/127.0.0.1/tcp/0",), validators=VALIDATORS)


async def _publish(peer: Overlay, number: int, record: WorkerRecord | CoordinatorRecord) -> None:
    if isinstance(record, WorkerRecord):
        await peer.put_record(worker_key(peer.peer_id), sign_worker_record(identity(number), record))
        await peer.provide(WORKERS_KEY)
    else:
        await peer.put_record(coordinator_key(peer.peer_id), sign_coordinator_record(identity(number), record))
        await peer.provide(COORDINATORS_KEY)


@pytest.mark.swarm
async def test_a_swarm_with_a_dead_and_a_malicious_worker() -> None:
    now = int(time.time())
    records = (
        worker(1, held(0, 12), now=now, addrs=()),
        coordinator(2, offer(), now=now),
        worker(3, held(0, 30), now=now - 600),
        worker(4, held(12, 14, "loading"), now=now, device=EVIL, agent=EVIL, addrs=(EVIL,), payout_address=EVIL),
    )
    async with a_swarm(*records) as addresses:
        table = await azu_dht("peers", "--bootstrap", addresses[0])
        document = await azu_dht("peers", "--json", AZU_BOOTSTRAP=addresses[0])
        cards = await azu_dht("models", "--bootstrap", addresses[0])
        started = time.monotonic()
        coverage = await azu_dht("models", "--bootstrap", addresses[0], "--json")
        took = time.monotonic() - started
    for done in (table, document, cards, coverage):
        assert (done.returncode, done.stderr) == (0, "")
        assert not set(done.stdout) & {"\x1b", "\x07", "\r", "\u202e"}

    _, _, first, *workers, _, summary = table.stdout.splitlines()
    assert [identity(2).peer_id[-8:] in first, "coordinator" in first, f"{MODEL}: 30 offered" in first] == [True] * 3
    assert len(workers) == 2
    assert f"{MODEL}: 0-11 loaded" in workers[0]
    assert " ms" in workers[0]  # it answered the ping
    assert "\\x1b[2J\\x1b]0;owned\\x07" in workers[1]
    assert " ms" not in workers[1]  # its record's address is none
    assert summary == "1 coordinator, 2 workers; 1 expired record left out"

    peers = {each["peer_id"]: each for each in json.loads(document.stdout)["peers"]}
    assert set(peers) == {identity(number).peer_id for number in (1, 2, 4)}
    assert peers[identity(1).peer_id]["rtt_ms"] > 0
    assert peers[identity(4).peer_id]["device"] == EVIL

    assert "  0 1111111111 11~~...... .........." in cards.stdout
    assert "12-29" in cards.stdout
    (model,) = json.loads(coverage.stdout)["models"]
    assert (model["model_id"], model["manifest"], model["n_layers"]) == (MODEL, MANIFEST, 30)
    assert model["missing"] == [{"start": 12, "end": 30}]
    assert model["workers"] == {"loaded": 1, "loading": 1, "cached": 0}
    assert took < 30  # about one second on an idle machine


@pytest.mark.slow
@pytest.mark.swarm
async def test_a_worker_that_hangs_is_not_waited_for() -> None:
    record = worker(7, now=int(time.time()))
    async with a_swarm() as addresses, AsyncExitStack() as stack:
        async with open_overlay(_config(7)) as peer:
            await peer.bootstrap(addresses)
            await _publish(peer, 7, record.model_copy(update={"addrs": peer.addrs}))
            port = int(peer.addrs[0].split("/")[4])
        stack.enter_context(socket.create_server(("127.0.0.1", port)))  # accepts, and never says a word
        started = time.monotonic()
        done = await azu_dht("peers", "--json", "--bootstrap", addresses[0])
        took = time.monotonic() - started
    (hanging,) = json.loads(done.stdout)["peers"]
    assert (hanging["peer_id"], hanging["rtt_ms"]) == (identity(7).peer_id, None)
    assert took < 45  # mostly look-ups that dial it again and again; two seconds for the ping


@pytest.mark.swarm
async def test_the_output_survives_its_surroundings() -> None:
    async with a_swarm(worker(1, held(0, 2), now=int(time.time()))) as addresses:
        done = await azu_dht("peers", "--bootstrap", addresses[0], PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"\\u2026{identity(1).peer_id[-8:]}" in done.stdout
        assert "worker" in done.stdout
        command = f"{PROGRAM} peers --bootstrap {addresses[0]} | true"
        piped = await trio.run_process(["sh", "-c", command], capture_stdout=True, capture_stderr=True)
        assert b"Traceback" not in piped.stderr


@pytest.mark.swarm
async def test_an_empty_swarm_says_what_to_do() -> None:
    async with a_swarm() as addresses:
        for command in ("peers", "models"):
            done = await azu_dht(command, "--bootstrap", addresses[0])
            assert (done.returncode, done.stderr) == (0, "")
            assert "no workers and no coordinators" in done.stdout
            assert f"azu-node join {addresses[0]}" in done.stdout
            assert f"azu-coordinator serve --bootstrap {addresses[0]} --model" in done.stdout
        done = await azu_dht("models", "--json", "--bootstrap", addresses[0])
        assert json.loads(done.stdout) == {"models": [], "expired": 0, "without_record": 0}


@pytest.mark.swarm
async def test_expired_records_and_idle_workers_are_explained() -> None:
    now = int(time.time())
    async with a_swarm(worker(1, now=now - 3600)) as addresses:
        done = await azu_dht("peers", "--bootstrap", addresses[0])
    assert "Expired records left out: 1" in done.stdout
    async with a_swarm(worker(1, now=now)) as addresses:
        done = await azu_dht("models", "--bootstrap", addresses[0])
    assert "No coordinator here offers a model" in done.stdout


# --- bad input ---


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "remedy: " in done.stderr
    assert done.stderr.startswith("azu-dht: error: ")
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", ["peers", "models"])
async def test_no_address(command: str) -> None:
    assert_refused(await azu_dht(command), 2, "--bootstrap MULTIADDR", "AZU_BOOTSTRAP")


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/tcp/4001", "/ip4/300.0.0.1/tcp/1/p2p/x"])
async def test_a_wrong_address(address: str) -> None:
    done = await azu_dht("peers", "--bootstrap", address)
    assert_refused(done, 2, "--bootstrap", address, "as `azu-bootstrap run` prints it")


async def test_bootstrap_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
    address = f"{place}/p2p/{identity(1).peer_id}"
    assert_refused(await azu_dht("models", "--bootstrap", address), 1, "no bootstrap node answered", place, "refused")
    done = await azu_dht("peers", "--json", "--log-json", "--bootstrap", address)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["fields"]["code"] == "bootstrap_unreachable"


@pytest.mark.slow
async def test_something_else_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}"
        done = await azu_dht("peers", "--bootstrap", f"{place}/p2p/{identity(1).peer_id}")
    assert_refused(done, 1, "no bootstrap node answered", place, "no answer in time")


@pytest.mark.swarm
async def test_another_peer_lives_there() -> None:
    async with a_swarm() as addresses:
        address = addresses[0].replace(identity(1000).peer_id, identity(7).peer_id)
        done = await azu_dht("peers", "--bootstrap", address)
    assert_refused(done, 1, "no bootstrap node answered", address.partition("/p2p/")[0])


@pytest.mark.swarm
async def test_a_peer_that_serves_no_dht() -> None:
    config = OverlayConfig(identity(1).seed, ("/ip4/127.0.0.1/tcp/0",), server=False)
    async with open_overlay(config) as peer:
        done = await azu_dht("peers", "--bootstrap", peer.addrs[0])
    assert_refused(done, 1, peer.peer_id, "serves no DHT")


def test_help_teaches() -> None:
    for words in (["--help"], ["peers", "--help"], ["models", "--help"]):
        done = subprocess.run([PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
    top = subprocess.run([PROGRAM, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "azu-dht peers --bootstrap /ip4/" in top
    assert "select(.complete | not)" in top
