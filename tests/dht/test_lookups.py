"""get, providers, find, ping and trace, as the program runs them, against real peers on loopback."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from azu.config import DhtSettings
from azu.dht import commands
from azu.errors import AzuError
from azu.overlay import open_overlay
from azu.records import WORKERS_KEY
from tests.dht.records import MANIFEST, MODEL, coordinator, held, identity, offer, worker
from tests.dht.swarm import EVIL, LIMIT, Swarm, a_swarm, config, publish

ME, COORDINATOR, THIRD, FOURTH, STRANGER = (identity(number).peer_id for number in (1, 2, 3, 4, 50))
HOUR = 4_000  # seconds, a little long: so that "4 h ago" stays true on a slow machine
Command = Callable[..., Awaitable[None]]


def now() -> int:
    return int(time.time())


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AZU_BOOTSTRAP", "AZU_SWARM_KEY", "AZU_AS_JSON"):
        monkeypatch.delenv(name, raising=False)


class Asker:
    """Runs commands in this process, and keeps what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def text(self, swarm: Swarm, command: Command, *words: str, **options: Any) -> str:
        """What a command prints for people."""
        return await self._run(swarm, command, words, options, as_json=False)

    async def document(self, swarm: Swarm, command: Command, *words: str, **options: Any) -> Any:
        """What it prints for programs."""
        return json.loads(await self._run(swarm, command, words, options, as_json=True))

    async def refusal(self, swarm: Swarm, command: Command, *words: str, **options: Any) -> AzuError:
        """The error that it ends with."""
        with pytest.raises(AzuError) as refused:
            await self.text(swarm, command, *words, **options)
        assert refused.value.remedy
        return refused.value

    async def _run(self, swarm: Swarm, command: Command, words: Any, options: Any, *, as_json: bool) -> str:
        await command(DhtSettings(bootstrap=(swarm.address,), as_json=as_json), *words, **options)
        text = self._capsys.readouterr().out
        assert not set(text) & {"\x1b", "\x07", "\r", "\u202e"}
        return text


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Asker:
    return Asker(capsys)


@pytest.mark.swarm
async def test_records(ask: Asker) -> None:
    hostile = worker(3, now=now(), agent=EVIL, device=EVIL, addrs=(EVIL,), payout_address=EVIL)
    async with a_swarm(
        worker(1, held(0, 12), now=now(), addrs=()), coordinator(2, offer(), now=now()), hostile
    ) as swarm:
        mine = await ask.text(swarm, commands.get, f"…{ME[-8:]}")
        assert f"{ME}  worker" in mine
        assert "in force" in mine
        assert f"{MANIFEST}: 0-11 loaded" in mine
        (record,) = (await ask.document(swarm, commands.get, f"/azu-worker/{ME[-6:]}"))["records"]
        assert (record["key"], record["state"], record["vram_total"]) == (f"/azu-worker/{ME}", "live", 8 * 1024**3)
        assert f"{MODEL}: 30 layers, manifest {MANIFEST}" in await ask.text(swarm, commands.get, COORDINATOR)
        assert "\\x1b[2J\\x1b]0;owned" in await ask.text(swarm, commands.get, THIRD)

        missing = await ask.refusal(swarm, commands.get, f"/azu-coordinator/{ME}")
        assert "no such record: it is a worker" in missing.message
        assert f"azu-dht get {ME}" in missing.remedy
        bootstrap = await ask.refusal(swarm, commands.get, swarm.meeting_point.peer_id[-8:])
        assert "bootstrap nodes have no record" in bootstrap.message
        unknown = await ask.refusal(swarm, commands.get, STRANGER)
        assert (unknown.code, unknown.message) == ("unknown_peer", f"nobody in this swarm knows {STRANGER}")


@pytest.mark.swarm
async def test_records_out_of_force_tell_the_dead_from_wrong_clocks(ask: Asker) -> None:
    async with a_swarm(worker(1, now=now() - 4 * HOUR, addrs=()), coordinator(2, now=now() + HOUR, addrs=())) as swarm:
        async with open_overlay(config(3)) as dead, open_overlay(config(4)) as silent:
            for each in (dead, silent):
                await each.bootstrap(swarm.meeting_point.addrs)
            await publish(dead, 3, worker(3, now=now() - 4 * HOUR).model_copy(update={"addrs": dead.addrs}), MANIFEST)
            await silent.provide(WORKERS_KEY)
        assert "expired 4 h ago, but the peer answers: the clock here is ahead" in await ask.text(
            swarm, commands.get, ME
        )
        assert "in the future: the clock here is behind" in await ask.text(swarm, commands.get, COORDINATOR)
        assert "expired 4 h ago, and the peer does not answer" in await ask.text(swarm, commands.get, THIRD)
        nothing = await ask.refusal(swarm, commands.get, FOURTH[-8:])
        assert "announced itself, but nobody has a record of it" in nothing.message
        table = await ask.text(swarm, commands.providers, MANIFEST, wide=False)
        assert "record expired 4 h ago" in table


@pytest.mark.swarm
@pytest.mark.parametrize(("ahead", "said"), [(3600, "have expired"), (-3600, "are dated in the future")])
async def test_a_clock_that_is_wrong_hides_everybody(ask: Asker, ahead: int, said: str) -> None:
    """Peers that renew their records all the time, and whose clocks differ from ours by an hour."""
    theirs = now() - ahead
    async with a_swarm(worker(1, now=theirs, addrs=()), coordinator(2, now=theirs, addrs=())) as swarm:
        text = await ask.text(swarm, commands.models, wide=False)
        document = await ask.document(swarm, commands.peers, wide=False)
    assert f"Peers answer here, but their records {said}" in text
    assert re.search(rf"clock is about (5\d|6\d) min {'ahead of' if ahead > 0 else 'behind'} theirs", text)
    assert "timedatectl set-ntp true" in text
    assert abs(document["clock_ahead_s"] - ahead) < LIMIT
    assert (document["peers"], document["expired"], document["early"]) == ([], *((2, 0) if ahead > 0 else (0, 2)))


@pytest.mark.swarm
async def test_providers(ask: Asker) -> None:
    ranges = held(0, 12), held(3, 20, "cached"), held(0, 9, manifest="cd" * 32)
    async with a_swarm(worker(1, *ranges, now=now(), addrs=()), coordinator(2, offer(), now=now(), addrs=())) as swarm:
        for peer in (*swarm.peers, swarm.meeting_point):
            await peer.provide(bytes.fromhex(MANIFEST))
        table = await ask.text(swarm, commands.providers, MANIFEST, wide=False)
        assert [line.split()[1] for line in table.splitlines() if line.startswith("…")] == [
            "coordinator",
            "worker",
            "-",
        ]
        rows = {line.split()[0]: line for line in table.splitlines() if line.startswith("…")}
        mine = list(swarm.peers[0].addrs)
        assert "worker" in rows[f"…{ME[-8:]}"]
        assert "0-11 loaded, 12-19 cached" in rows[f"…{ME[-8:]}"], "of this model only"
        assert mine[0].partition("/p2p/")[0] in rows[f"…{ME[-8:]}"]
        assert "30 offered" in rows[f"…{COORDINATOR[-8:]}"]
        assert "no record: just started, or gone" in rows[f"…{swarm.meeting_point.peer_id[-8:]}"]

        document = await ask.document(swarm, commands.providers, MODEL, wide=False)
        assert document == await ask.document(swarm, commands.providers, MANIFEST[:12], wide=True)
        found = {each["peer_id"]: each for each in document["providers"]}
        assert set(found) == {ME, COORDINATOR, swarm.meeting_point.peer_id}
        assert found[ME]["addrs"] == mine
        held_here = [(each["start"], each["end"], each["state"]) for each in found[ME]["records"][0]["ranges"]]
        assert held_here == [(0, 12, "loaded"), (3, 20, "cached")]
        assert found[COORDINATOR]["records"][0]["offers"][0]["n_layers"] == 30

        nobody = await ask.text(swarm, commands.providers, "12" * 32, wide=False)
        assert f"Nobody here has announced the manifest {'12' * 32}" in nobody
        assert "azu-dht models" in nobody
        unknown = await ask.refusal(swarm, commands.providers, "gpt-5", wide=False)
        assert ("no coordinator here offers 'gpt-5'" in unknown.message, MODEL in unknown.remedy) == (True, True)


@pytest.mark.swarm
async def test_addresses(ask: Asker) -> None:
    circuit = f"/ip4/192.0.2.9/tcp/4001/p2p/{STRANGER}/p2p-circuit/p2p/{THIRD}"
    claims = worker(3, now=now(), addrs=(circuit, EVIL))
    async with a_swarm(worker(1, now=now(), addrs=()), coordinator(2, now=now(), addrs=()), claims) as swarm:
        place = swarm.peers[0].addrs[0]
        table = await ask.text(swarm, commands.find, ME[-8:])
        assert (place in table, "direct" in table, "its record" in table) == (True, True, True)
        found = await ask.document(swarm, commands.find, ME)
        assert found["peer_id"] == ME
        assert {"address": place, "path": "direct", "in_record": True, "in_network": True} in found["addresses"]
        relayed = await ask.document(swarm, commands.find, THIRD)
        addresses = {each["address"]: each for each in relayed["addresses"]}
        assert addresses[circuit] == {"address": circuit, "path": "relayed", "in_record": True, "in_network": False}
        assert EVIL not in addresses
        assert addresses[swarm.peers[2].addrs[0]]["in_record"] is False, "what others know, its record may not say"
        assert (await ask.refusal(swarm, commands.find, STRANGER)).code == "unknown_peer"


@pytest.mark.swarm
async def test_pings(ask: Asker) -> None:
    async with a_swarm(worker(1, now=now(), addrs=()), coordinator(2, now=now(), addrs=())) as swarm:
        *lines, last = (await ask.text(swarm, commands.ping, ME[-8:], count=2)).splitlines()
        assert [line.split()[0] for line in lines] == ["1", "2"]
        assert all(line.endswith(" ms  direct") for line in lines)
        assert last.startswith("2 pings, 0 lost; ")
        answer = await ask.document(swarm, commands.ping, COORDINATOR, count=1)
        assert answer["peer_id"] == COORDINATOR
        assert [(each["path"], each["rtt_ms"] > 0) for each in answer["pings"]] == [("direct", True)]
        assert "1 ping, 0 lost" in await ask.text(swarm, commands.ping, swarm.meeting_point.peer_id[-8:], count=1)
        assert (await ask.refusal(swarm, commands.ping, STRANGER, count=1)).code == "unknown_peer"
        ending = await ask.refusal(swarm, commands.ping, "zzzzzzzz", count=1)
        assert "none of the 3 peers that are announced here" in ending.message


@pytest.mark.swarm
async def test_a_peer_that_is_known_and_does_not_answer(ask: Asker) -> None:
    async with a_swarm() as swarm:
        async with open_overlay(config(1)) as peer:
            await peer.bootstrap(swarm.meeting_point.addrs)
            await publish(peer, 1, worker(1, now=now()).model_copy(update={"addrs": peer.addrs}))
            place = peer.addrs[0]
        error = await ask.refusal(swarm, commands.ping, ME[-8:], count=1)
    assert (error.code, f"{ME} is known, but does not answer at {place}" in error.message) == ("no_answer", True)


@pytest.mark.swarm
async def test_traces(ask: Asker) -> None:
    async with a_swarm(*(worker(number, now=now(), addrs=()) for number in range(1, 8))) as swarm:
        start = swarm.meeting_point.peer_id
        everybody = {start, *(peer.peer_id for peer in swarm.peers)}
        table = await ask.text(swarm, commands.trace, f"/azu-worker/{ME[-8:]}", as_member=False, wide=False)
        assert f"…{start[-8:]}    #1" in table
        assert "└─…" in table
        assert "closest to the key: …" in table
        newcomer = await ask.document(swarm, commands.trace, ME, as_member=False, wide=False)
        member = await ask.document(swarm, commands.trace, ME, as_member=True, wide=False)
        for found in (newcomer, member):
            asked = [hop["peer_id"] for hop in found["hops"]]
            assert len(asked) == len(set(asked))
            assert set(asked) <= everybody
            assert found["closest"][0] == ME, "no id is closer to a peer than its own"
            for hop in found["hops"]:
                assert hop["error"] is not None or hop["time_ms"] > 0
                assert (hop["shared_bits"] == 256) == (hop["peer_id"] == ME)
        assert [hop["peer_id"] for hop in newcomer["hops"] if hop["named_by"] is None] == [start]
        assert {hop["path"] for hop in member["hops"]} == {0, 1, 2}
        digest = await ask.document(swarm, commands.trace, MANIFEST.upper(), as_member=True, wide=False)
        assert (digest["key"], digest["asked_for"]) == ("1220" + MANIFEST, MANIFEST.upper())
        assert "is not a peer id" in (await ask.refusal(swarm, commands.trace, "!", as_member=True, wide=False)).message
