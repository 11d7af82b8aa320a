"""Look-ups in simulated networks of any size and honesty, and in real ones."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from azu.errors import NetworkError
from azu.overlay import open_overlay
from azu.overlay.lookup import K, Lookup
from tests.overlay.conftest import config

ME = ID(b"\x12\x20" + bytes(32))


def place(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest())


class Network:
    """Peers with routing tables as Kademlia would have them; some name only their fellows."""

    def __init__(self, size: int, *, liars: int = 0, dead: int = 0, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.peers = [ID(b"\x12\x20" + self.rng.randbytes(32)) for _ in range(size)]
        self.liars = set(self.rng.sample(self.peers, liars))
        honest = [peer for peer in self.peers if peer not in self.liars]
        self.dead = set(self.rng.sample(honest, dead))
        self.places = {peer: place(peer.to_bytes()) for peer in self.peers}
        self.tables = {peer: self.table_of(peer) for peer in self.peers}
        self.queries = 0

    def table_of(self, me: ID) -> list[ID]:
        buckets: dict[int, list[ID]] = {}
        for peer in self.rng.sample(self.peers, len(self.peers)):
            bucket = (self.places[peer] ^ self.places[me]).bit_length()
            if peer != me and len(buckets.setdefault(bucket, [])) < K:
                buckets[bucket].append(peer)
        return [peer for bucket in buckets.values() for peer in bucket]

    def closest(self, key: bytes, among: Sequence[ID] | set[ID]) -> list[ID]:
        return sorted(among, key=lambda peer: self.places[peer] ^ place(key))[:K]

    def lookup(self, key: bytes, seeds: Sequence[ID]) -> Lookup:
        async def ask(peer: ID) -> list[ID]:
            self.queries += 1
            await trio.lowlevel.checkpoint()
            if peer in self.dead:
                raise NetworkError("it is dead")
            return self.closest(key, self.liars if peer in self.liars else self.tables[peer])

        return Lookup(key, ME, seeds, ask)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 120), seed=st.integers(0, 10_000), dead=st.floats(0, 0.3))
def test_the_closest_living_peers_are_found(size: int, seed: int, dead: float) -> None:
    network = Network(size, dead=int(size * dead), seed=seed)
    seeds = network.rng.sample(network.peers, min(size, 6))
    if set(seeds) <= network.dead:
        return
    lookup = network.lookup(b"key", seeds)
    trio.run(lookup.run)
    alive = [peer for peer in network.peers if peer not in network.dead]
    found, wanted = lookup.closest, network.closest(b"key", alive)
    assert found[:3] == wanted[:3]
    if not network.dead:  # else peers name the dead among the K closest that they know
        assert len(set(found) & set(wanted)) >= 0.9 * len(wanted)


def test_a_look_up_asks_few_and_nobody_twice() -> None:
    asked = {}
    for size in (50, 200, 800):
        network = Network(size, seed=size)
        lookup = network.lookup(b"key", network.rng.sample(network.peers, 6))
        trio.run(lookup.run)
        hops = lookup.trace.hops
        assert len({hop.peer_id for hop in hops}) == len(hops) == network.queries
        asked[size] = network.queries
    # Besides the K closest themselves, about as many as the logarithm of the number of peers on each path.
    assert all(count <= 2 * K + 6 * math.log2(size) for size, count in asked.items()), asked
    assert asked[800] < asked[50] + 40


def test_liars_on_one_path_do_not_keep_the_answer_from_the_others() -> None:
    found = 0
    for seed in range(20):
        network = Network(150, liars=30, seed=seed)
        honest = [peer for peer in network.peers if peer not in network.liars]
        seeds = [*network.rng.sample(sorted(network.liars, key=str), 2), *network.rng.sample(honest, 4)]
        lookup = network.lookup(b"key", seeds)
        trio.run(lookup.run)
        found += network.closest(b"key", honest)[0] in lookup.closest
    assert found >= 18


def test_who_named_whom_is_told() -> None:
    network = Network(60, seed=3)
    seeds = network.peers[:4]
    lookup = network.lookup(b"key", seeds)
    trio.run(lookup.run)
    trace = lookup.trace
    order = [hop.peer_id for hop in trace.hops]
    for hop in trace.hops:
        assert hop.named_by is None if hop.peer_id in map(str, seeds) else hop.named_by in order
        assert 0 <= hop.shared_bits <= 256
        assert hop.path in range(3)
    assert trace.closest == tuple(map(str, lookup.closest))


async def test_silent_peers_do_not_hold_it_up(autojump_clock: trio.testing.MockClock) -> None:
    network = Network(30, seed=1)

    async def ask(peer: ID) -> list[ID]:
        if peer in network.peers[:10]:
            await trio.sleep_forever()
        return network.closest(b"key", network.tables[peer])

    lookup = Lookup(b"key", ME, network.peers[:12], ask)
    with trio.fail_after(60):
        await lookup.run()
    assert {hop.error for hop in lookup.trace.hops if hop.seconds is None} == {"no answer in time"}
    assert len(lookup.closest) >= 15


async def test_a_real_look_up_is_traced() -> None:
    async with AsyncExitStack() as stack:
        overlays = []
        for number in range(8):
            overlays.append(await stack.enter_async_context(open_overlay(config(number + 1))))
            if len(overlays) > 1:
                await overlays[-1].bootstrap([overlays[0].addrs[0]])
        client = await stack.enter_async_context(open_overlay(config(99, listen=(), server=False)))
        await client.bootstrap([overlays[0].addrs[0]])
        trace = await client.trace(b"/azu-worker/somebody-whose-name-is-longer-than-fifty-characters")
        assert {hop.peer_id for hop in trace.hops if hop.seconds is not None} == {each.peer_id for each in overlays}
        assert set(trace.closest) == {each.peer_id for each in overlays}
        found = await client.find_peer(overlays[5].peer_id)
        assert set(found) & set(overlays[5].addrs)


async def test_a_bucket_takes_two_peers_of_a_subnet(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(open_overlay(config(99)))
        others = [await stack.enter_async_context(open_overlay(config(number + 1))) for number in range(6)]
        where = {each.peer_id: f"25.{9 if number < 4 else number}.0.{number + 1}" for number, each in enumerate(others)}
        monkeypatch.setattr(
            hub._swarm, "location_of", lambda peer: Multiaddr(f"/ip4/{where.get(str(peer), '127.0.0.1')}/tcp/1")
        )
        for each in others:
            await each.bootstrap([hub.addrs[0]])
        with trio.fail_after(60):
            while hub.statistics().routing_table < 4:
                await trio.sleep(0.02)
        await trio.sleep(1)
        entered = [where[str(peer)] for peer in hub._dht.service.routing_table.get_peer_ids()]
        assert sum(address.startswith("25.9.") for address in entered) == 2
        assert len(entered) == 4
