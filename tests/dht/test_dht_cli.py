"""The real azu-dht program's peers and models, against real peers on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from azu.dht_cli import main
from azu.overlay import open_overlay
from tests.dht.records import MANIFEST, MODEL, coordinator, held, identity, offer, worker
from tests.dht.swarm import EVIL, PROGRAM, ROOT, a_swarm, assert_refused, azu_dht, config, publish


@pytest.mark.swarm
async def test_a_swarm_with_a_dead_and_a_malicious_worker() -> None:
    now = int(time.time())
    records = (
        worker(1, held(0, 12), now=now, addrs=()),
        coordinator(2, offer(), now=now),
        worker(3, held(0, 30), now=now - 600),
        worker(4, held(12, 14, "loading"), now=now, device=EVIL, agent=EVIL, addrs=(EVIL,), payout_address=EVIL),
    )
    async with a_swarm(*records) as swarm:
        table = await azu_dht("peers", "--bootstrap", swarm.address)
        document = await azu_dht("peers", "--json", AZU_BOOTSTRAP=swarm.address)
        cards = await azu_dht("models", "--bootstrap", swarm.address)
        started = time.monotonic()
        coverage = await azu_dht("models", "--bootstrap", swarm.address, "--json")
        took = time.monotonic() - started
    for done in (table, document, cards, coverage):
        assert (done.returncode, done.stderr) == (0, "")
        assert not set(done.stdout) & {"\x1b", "\x07", "\r", "\u202e"}

    _, _, first, *workers, _, summary = table.stdout.splitlines()
    assert [identity(2).peer_id[-8:] in first, "coordinator" in first, f"{MODEL}: 30 offered" in first] == [True] * 3
    assert len(workers) == 2
    assert f"{MODEL}: 0-11 loaded" in workers[0]
    assert " ms" in workers[0]  # it answered the ping
    assert "direct" in workers[0]
    assert "\\x1b[2J\\x1b]0;owned\\x07" in workers[1]
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
    async with a_swarm() as swarm, AsyncExitStack() as stack:
        async with open_overlay(config(7)) as peer:
            await peer.bootstrap(swarm.meeting_point.addrs)
            await publish(peer, 7, record.model_copy(update={"addrs": peer.addrs}))
            port = int(peer.addrs[0].split("/")[4])
        stack.enter_context(socket.create_server(("127.0.0.1", port)))  # accepts, and never says a word
        started = time.monotonic()
        done = await azu_dht("peers", "--json", "--bootstrap", swarm.address)
        took = time.monotonic() - started
    (hanging,) = json.loads(done.stdout)["peers"]
    assert (hanging["peer_id"], hanging["rtt_ms"]) == (identity(7).peer_id, None)
    assert took < 45  # mostly look-ups that dial it again and again; two seconds for the ping


@pytest.mark.swarm
async def test_the_output_survives_its_surroundings() -> None:
    async with a_swarm(worker(1, held(0, 2), now=int(time.time()))) as swarm:
        done = await azu_dht("peers", "--bootstrap", swarm.address, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"\\u2026{identity(1).peer_id[-8:]}" in done.stdout
        assert "worker" in done.stdout
        command = f"{PROGRAM} peers --bootstrap {swarm.address} | true"
        piped = await trio.run_process(["sh", "-c", command], capture_stdout=True, capture_stderr=True)
        assert b"Traceback" not in piped.stderr


@pytest.mark.swarm
async def test_an_empty_swarm_says_what_to_do() -> None:
    async with a_swarm() as swarm:
        for command in ("peers", "models"):
            done = await azu_dht(command, "--bootstrap", swarm.address)
            assert (done.returncode, done.stderr) == (0, "")
            assert "no workers and no coordinators" in done.stdout
            assert f"azu-node join {swarm.address}" in done.stdout
            assert f"azu-coordinator serve --bootstrap {swarm.address} --model" in done.stdout
        done = await azu_dht("models", "--json", "--bootstrap", swarm.address)
        left_out = {"expired": 0, "early": 0, "without_record": 0, "clock_ahead_s": None}
        assert json.loads(done.stdout) == {"models": [], **left_out}


@pytest.mark.swarm
async def test_idle_workers_are_explained() -> None:
    async with a_swarm(worker(1, now=int(time.time()))) as swarm:
        done = await azu_dht("models", "--bootstrap", swarm.address)
    assert "No coordinator here offers a model" in done.stdout


@pytest.mark.swarm
async def test_expired_records_of_peers_that_are_gone() -> None:
    async with a_swarm() as swarm:
        async with open_overlay(config(1)) as peer:
            await peer.bootstrap(swarm.meeting_point.addrs)
            gone = worker(1, now=int(time.time()) - 3600).model_copy(update={"addrs": peer.addrs})
            await publish(peer, 1, gone)
        done = await azu_dht("peers", "--bootstrap", swarm.address)
    assert "no workers and no coordinators" in done.stdout
    assert "Expired records left out: 1. Those peers do not answer" in done.stdout


@pytest.mark.swarm
async def test_every_question_has_a_json_answer() -> None:
    me, now = identity(1).peer_id, int(time.time())
    answers: dict[str, Any] = {}

    async def ask(words: str, address: str) -> None:
        done = await azu_dht(*words.split(), "--json", "--bootstrap", address)
        assert (done.returncode, done.stderr) == (0, "")
        answers[words.split()[0]] = json.loads(done.stdout)

    questions = f"get {me}", f"providers {MODEL}", f"find {me}", f"ping --count 1 {me}", f"trace {me[-8:]}"
    async with a_swarm(worker(1, now=now, addrs=()), coordinator(2, offer(), now=now, addrs=())) as swarm:
        await swarm.peers[0].provide(bytes.fromhex(MANIFEST))
        async with trio.open_nursery() as nursery:
            for words in questions:
                nursery.start_soon(ask, words, swarm.address)
    assert answers["get"]["records"][0]["peer_id"] == me
    assert [each["peer_id"] for each in answers["providers"]["providers"]] == [me]
    assert answers["find"]["addresses"]
    assert answers["ping"]["pings"][0]["path"] == "direct"
    assert answers["trace"]["closest"][0] == me


# --- bad input ---


@pytest.mark.parametrize("command", ["peers", "models"])
async def test_no_address(command: str) -> None:
    assert_refused(await azu_dht(command), 2, "--bootstrap MULTIADDR", "AZU_BOOTSTRAP")


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/tcp/4001", "/ip4/300.0.0.1/tcp/1/p2p/x"])
async def test_a_wrong_address(address: str) -> None:
    done = await azu_dht("peers", "--bootstrap", address)
    assert_refused(done, 2, "--bootstrap", address, "as `azu-bootstrap run` prints it")


def test_help_teaches() -> None:
    for name in main.commands:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert (shown.exit_code, "env: AZU_BOOTSTRAP" in shown.output, "--json" in shown.output) == (0, True, True)
    top = subprocess.run([PROGRAM, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "azu-dht peers --bootstrap /ip4/" in top
    assert "select(.complete | not)" in top
