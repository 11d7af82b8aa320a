"""azu-dht's peers and models, and what holds for all of its commands, asked of a real swarm."""

from __future__ import annotations

import socket
import time
from contextlib import AsyncExitStack

import pytest
from click.testing import CliRunner

from azu.config import DhtSettings
from azu.dht import commands, survey
from azu.dht.visit import visit
from azu.dht_cli import main
from azu.overlay import open_overlay
from tests.dht.conftest import Program
from tests.dht.lively import COORDINATOR, EVIL, GONE, HOSTILE, ME, Lively
from tests.dht.records import MANIFEST, MODEL, identity, worker
from tests.dht.swarm import a_swarm, azu_dht, config, publish


@pytest.mark.swarm
async def test_the_program_at_a_pipe(lively: Lively) -> None:
    done = await azu_dht("peers", "--bootstrap", lively.address, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\\u2026{ME[-8:]}" in done.stdout
    assert done.stdout.isascii()
    assert not set(done.stdout) & {"\x1b", "\x07", "\r"}


@pytest.mark.swarm
def test_peers(program: Program) -> None:
    _, _, first, *workers, _, summary = program.text("peers").splitlines()
    assert [COORDINATOR[-8:] in first, "coordinator" in first, f"{MODEL}: 30 offered" in first] == [True] * 3
    rows = {row.split()[0]: row for row in workers}
    assert set(rows) == {f"…{each[-8:]}" for each in (ME, HOSTILE, GONE)}
    mine = rows[f"…{ME[-8:]}"]
    assert f"{MODEL}: 0-11 loaded" in mine
    assert " ms" in mine  # it answered the ping
    assert "direct" in mine
    assert "\\x1b[2J\\x1b]0;owned\\x07" in rows[f"…{HOSTILE[-8:]}"]
    assert summary == (
        "1 coordinator, 3 workers; 2 expired records left out; 1 record dated in the future left out; "
        "1 peer announced without a record"
    )
    peers = {each["peer_id"]: each for each in program.document("peers")["peers"]}
    assert set(peers) == {ME, COORDINATOR, HOSTILE, GONE}
    assert (peers[ME]["rtt_ms"] > 0, peers[ME]["path"]) == (True, "direct")
    assert (peers[GONE]["rtt_ms"], peers[GONE]["path"]) == (None, None)
    assert peers[HOSTILE]["device"] == EVIL


@pytest.mark.swarm
def test_models(program: Program) -> None:
    cards = program.text("models")
    assert "  0 1111111111 11~~...... .........." in cards
    assert "12-29" in cards
    model, _ = program.document("models")["models"]
    assert (model["model_id"], model["manifest"], model["n_layers"]) == (MODEL, MANIFEST, 30)
    assert model["missing"] == [{"start": 12, "end": 30}]
    assert model["workers"] == {"loaded": 1, "loading": 1, "cached": 0}


@pytest.mark.swarm
async def test_a_worker_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "PING_SECONDS", 0.3)
    record = worker(7, now=int(time.time()))
    async with a_swarm() as swarm, AsyncExitStack() as stack:
        async with open_overlay(config(7, server=False)) as peer:
            await peer.bootstrap(swarm.meeting_point.addrs)
            await publish(peer, 7, record.model_copy(update={"addrs": peer.addrs, "expires_at": 2**33}))
            port = int(peer.addrs[0].split("/")[4])
        stack.enter_context(socket.create_server(("127.0.0.1", port)))  # accepts, and never says a word
        async with visit(DhtSettings(bootstrap=(swarm.address,))) as overlay:
            snapshot = await survey.look(overlay, with_rtt=True)
    (hanging,) = snapshot.workers
    assert (hanging.record.peer_id, hanging.pong) == (identity(7).peer_id, None)


@pytest.mark.swarm
async def test_an_empty_swarm_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    async with a_swarm() as swarm:
        settings = DhtSettings(bootstrap=(swarm.address,))
        for command in (commands.peers, commands.models):
            await command(settings, wide=False)
            said = capsys.readouterr().out
            assert "no workers and no coordinators" in said
            assert f"azu-node join {swarm.address}" in said
            assert f"azu-coordinator serve --bootstrap {swarm.address} --model" in said
        async with open_overlay(config(1)) as peer:
            await peer.bootstrap([swarm.address])
            await publish(peer, 1, worker(1, now=int(time.time()) - 3600).model_copy(update={"addrs": peer.addrs}))
        await commands.peers(settings, wide=False)
        assert "Expired records left out: 1. Those peers do not answer" in capsys.readouterr().out


@pytest.mark.swarm
async def test_idle_workers_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    async with a_swarm(worker(1, now=int(time.time()))) as swarm:
        await commands.models(DhtSettings(bootstrap=(swarm.address,)), wide=False)
    assert "No coordinator here offers a model" in capsys.readouterr().out


# --- bad input ---


@pytest.mark.parametrize("command", ["peers", "models", "watch --json", "get X", "providers X", "find X", "trace X"])
def test_no_address(lost: Program, command: str) -> None:
    said = lost.refusal(2, *command.split())
    assert ("--bootstrap MULTIADDR" in said, "AZU_BOOTSTRAP" in said) == (True, True)


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/tcp/4001", "/ip4/300.0.0.1/tcp/1/p2p/x"])
def test_a_wrong_address(lost: Program, address: str) -> None:
    said = lost.refusal(2, "peers", "--bootstrap", address)
    assert all(words in said for words in ("--bootstrap", address, "as `azu-bootstrap run` prints it"))


def test_help_teaches() -> None:
    for name in main.commands:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert (shown.exit_code, "env: AZU_BOOTSTRAP" in shown.output, "--json" in shown.output) == (0, True, True)
    top = CliRunner().invoke(main, ["--help"]).output
    assert "azu-dht peers --bootstrap /ip4/" in top
    assert "select(.complete | not)" in top
