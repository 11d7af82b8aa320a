"""get, providers, find, ping and trace, asked of a real swarm."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from azu.config import DhtSettings
from azu.dht import commands, lookups
from azu.dht.peers import nobody, peers_document
from azu.dht.survey import look
from azu.dht.visit import visit
from azu.errors import NetworkError
from azu.overlay import OverlayStream
from tests.dht.conftest import Program
from tests.dht.lively import (
    COORDINATOR,
    DEAD,
    EARLY,
    EVERYBODY,
    EVIL,
    EXPIRED,
    GONE,
    HOSTILE,
    ME,
    RELAYED,
    SILENT,
    STRANGER,
    Lively,
)
from tests.dht.records import MANIFEST, MODEL, coordinator, worker
from tests.dht.swarm import LIMIT, a_swarm

pytestmark = pytest.mark.swarm


def test_records(program: Program) -> None:
    mine = program.text("get", f"…{ME[-8:]}")
    assert f"{ME}  worker" in mine
    assert "in force" in mine
    assert f"{MANIFEST}: 0-11 loaded" in mine
    (record,) = program.document("get", f"/azu-worker/{ME[-6:]}")["records"]
    assert (record["key"], record["state"], record["vram_total"]) == (f"/azu-worker/{ME}", "live", 8 * 1024**3)
    assert f"{MODEL}: 30 layers, manifest {MANIFEST}" in program.text("get", COORDINATOR)
    assert "\\x1b[2J\\x1b]0;owned" in program.text("get", HOSTILE)


def test_records_that_are_not_there(program: Program, lively: Lively) -> None:
    missing = program.refusal(1, "get", f"/azu-coordinator/{ME}")
    assert "no such record: it is a worker" in missing
    assert f"azu-dht get {ME}" in missing
    assert "bootstrap nodes have no record" in program.refusal(1, "get", lively.bootstrap_id[-8:])
    assert f"nobody in this swarm knows {STRANGER}" in program.refusal(1, "get", STRANGER)
    assert "announced itself, but nobody has a record of it" in program.refusal(1, "get", SILENT[-8:])
    assert "is not the key of a record" in program.refusal(2, "get", "/ipns/somebody")


def test_records_out_of_force_tell_the_dead_from_wrong_clocks(program: Program) -> None:
    assert "expired 4 h ago, but the peer answers: the clock here is ahead" in program.text("get", EXPIRED)
    assert "in the future: the clock here is behind" in program.text("get", EARLY)
    assert "expired 4 h ago, and the peer does not answer" in program.text("get", DEAD)


@pytest.mark.parametrize(("ahead", "said"), [(3600, "have expired"), (-3600, "are dated in the future")])
async def test_a_clock_that_is_wrong_hides_everybody(ahead: int, said: str) -> None:
    """Peers that renew their records all the time, and whose clocks differ from ours by an hour."""
    theirs = int(time.time()) - ahead
    async with AsyncExitStack() as stack:
        records = worker(1, now=theirs, addrs=()), coordinator(2, now=theirs, addrs=())
        swarm = await stack.enter_async_context(a_swarm(*records))
        overlay = await stack.enter_async_context(visit(DhtSettings(bootstrap=(swarm.address,))))
        found = await look(overlay, with_rtt=True)
    document = peers_document(found)
    assert abs(document["clock_ahead_s"] - ahead) < LIMIT
    assert (document["peers"], document["expired"], document["early"]) == ([], *((2, 0) if ahead > 0 else (0, 2)))
    text = nobody(found, "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWX")
    assert f"Peers answer here, but their records {said}" in text
    assert f"min {'ahead of' if ahead > 0 else 'behind'} theirs" in text
    assert "timedatectl set-ntp true" in text


def test_providers(program: Program, lively: Lively) -> None:
    table = program.text("providers", MANIFEST)
    lines = [line for line in table.splitlines() if line.startswith("…")]
    assert [line.split()[1] for line in lines[:2]] == ["coordinator", "worker"]
    rows = {line.split()[0]: line for line in lines}
    assert "0-11 loaded, 12-19 cached" in rows[f"…{ME[-8:]}"], "of this model only"
    assert lively.addrs[ME][0].partition("/p2p/")[0] in rows[f"…{ME[-8:]}"]
    assert "30 offered" in rows[f"…{COORDINATOR[-8:]}"]
    assert "record expired 4 h ago" in rows[f"…{DEAD[-8:]}"]
    assert "no record: just started, or gone" in rows[f"…{lively.bootstrap_id[-8:]}"]

    document = program.document("providers", MODEL)
    assert document == program.document("providers", MANIFEST[:12], "--wide")
    found = {each["peer_id"]: each for each in document["providers"]}
    assert set(found) == {ME, COORDINATOR, DEAD, lively.bootstrap_id}
    assert found[ME]["addrs"] == lively.addrs[ME]
    held_here = [(each["start"], each["end"], each["state"]) for each in found[ME]["records"][0]["ranges"]]
    assert held_here == [(0, 12, "loaded"), (3, 20, "cached")]
    assert found[COORDINATOR]["records"][0]["offers"][0]["n_layers"] == 30


def test_providers_that_are_not_there(program: Program) -> None:
    nobody_has_it = program.refusal(1, "providers", "12" * 32)
    assert f"nobody here has announced the manifest {'12' * 32}" in nobody_has_it
    assert "azu-dht models" in nobody_has_it
    unknown = program.refusal(2, "providers", "gpt-5")
    assert ("no coordinator here offers 'gpt-5'" in unknown, MODEL in unknown) == (True, True)


def test_addresses(program: Program, lively: Lively) -> None:
    place = lively.addrs[ME][0]
    table = program.text("find", ME[-8:])
    assert (place in table, "direct" in table, "its record" in table) == (True, True, True)
    found = program.document("find", ME)
    assert found["peer_id"] == ME
    assert {"address": place, "path": "direct", "in_record": True, "in_network": True} in found["addresses"]
    addresses = {each["address"]: each for each in program.document("find", HOSTILE)["addresses"]}
    assert addresses[RELAYED] == {"address": RELAYED, "path": "relayed", "in_record": True, "in_network": False}
    assert EVIL not in addresses
    own = lively.addrs[HOSTILE][0]
    assert addresses[own]["in_record"] is False, "what others know, its record may not say"
    assert f"nobody in this swarm knows {STRANGER}" in program.refusal(1, "find", STRANGER)


def test_pings(program: Program, lively: Lively) -> None:
    *lines, last = program.text("ping", ME[-8:], "--count", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert all(line.endswith(" ms  direct") for line in lines)
    assert last.startswith("2 pings, 0 lost; ")
    answer = program.document("ping", COORDINATOR, "--count", "1")
    assert answer["peer_id"] == COORDINATOR
    assert [(each["path"], each["rtt_ms"] > 0) for each in answer["pings"]] == [("direct", True)]
    assert "1 ping, 0 lost" in program.text("ping", lively.bootstrap_id[-8:], "--count", "1")


def test_pings_without_an_answer(program: Program, lively: Lively) -> None:
    gone = program.refusal(1, "ping", GONE)
    assert f"{GONE} is known, but does not answer at {lively.addrs[GONE][0]}" in gone
    assert f"nobody in this swarm knows {STRANGER}" in program.refusal(1, "ping", STRANGER)
    assert "peers that are announced here has an id that ends in zzzzzzzz" in program.refusal(2, "ping", "zzzzzzzz")


async def test_a_peer_that_answers_no_ping(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def hang(stream: OverlayStream) -> None:
        await trio.sleep_forever()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lookups, "PING_SECONDS", 0.2)
    monkeypatch.setattr(lookups, "PAUSE_SECONDS", 0.0)
    async with a_swarm() as swarm:
        swarm.meeting_point.handle("/ipfs/ping/1.0.0", hang)
        settings = DhtSettings(bootstrap=(swarm.address,))
        with pytest.raises(NetworkError) as refused:
            await commands.ping(settings, swarm.meeting_point.peer_id, count=2)
    first, second, summary = capsys.readouterr().out.splitlines()
    assert (first, second) == ("  1  no answer", "  2  no answer")
    assert summary.startswith("2 pings, 2 lost; connected")
    assert (refused.value.code, bool(refused.value.remedy)) == ("no_answer", True)


def test_traces(program: Program, lively: Lively) -> None:
    start = lively.bootstrap_id
    table = program.text("trace", f"/azu-worker/{ME[-8:]}")
    assert f"…{start[-8:]}    #1" in table
    assert "└─…" in table
    assert "closest to the key: …" in table
    newcomer, member = program.document("trace", ME), program.document("trace", ME, "--as-member")
    for found in (newcomer, member):
        asked = [hop["peer_id"] for hop in found["hops"]]
        assert len(asked) == len(set(asked))
        assert set(asked) <= {start, *EVERYBODY}
        assert found["closest"][0] == ME, "no id is closer to a peer than its own"
        for hop in found["hops"]:
            assert hop["error"] is not None or hop["time_ms"] > 0
            assert (hop["shared_bits"] == 256) == (hop["peer_id"] == ME)
    assert [hop["peer_id"] for hop in newcomer["hops"] if hop["named_by"] is None] == [start]
    assert {hop["path"] for hop in member["hops"]} == {0, 1, 2}
    digest = program.document("trace", MANIFEST.upper(), "--as-member")
    assert (digest["key"], digest["asked_for"]) == ("1220" + MANIFEST, MANIFEST.upper())
    record = program.document("trace", f"/azu-worker/{ME[-8:]}")
    assert (record["asked_for"], bytes.fromhex(record["key"])) == (f"/azu-worker/{ME}", f"/azu-worker/{ME}".encode())
    assert "is not a peer id" in program.refusal(2, "trace", "!")
