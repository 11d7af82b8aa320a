"""Records and providers across real nodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import pytest
import trio
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError

from azu.errors import InputError, NetworkError, ProtocolError, TrustError
from azu.overlay import MAX_RECORD_BYTES, Overlay, dht, open_overlay
from azu.overlay.addresses import parse_peer_id
from tests.overlay.conftest import LIMIT, config

Swarm = Callable[[int], AbstractAsyncContextManager[list[Overlay]]]
KEY = "/test-ns/worker"


async def test_newer_record_is_seen_by_who_holds_an_older_copy(swarm: Swarm) -> None:
    with trio.fail_after(LIMIT):
        async with swarm(5) as nodes:
            await nodes[1].put_record(KEY, b"1:old")
            assert [await each.get_record(KEY) for each in nodes] == [b"1:old"] * 5
            await nodes[1].put_record(KEY, b"2:new")
            assert [await each.get_record(KEY) for each in nodes] == [b"2:new"] * 5  # trap 8
            await nodes[3].put_record(KEY, b"2:new")  # a renewal of the same value is taken
            with pytest.raises(InputError) as caught:
                await nodes[1].put_record(KEY, b"1:old")
            assert caught.value.code == "stale_record"
            assert await nodes[4].get_record("/test-ns/nobody") is None


async def test_unacceptable_records_are_refused_locally(pair: tuple[Overlay, Overlay]) -> None:
    _, client = pair
    for value, kind in (
        (b"no number", ProtocolError),
        (b"1:bad", TrustError),
        (b"1:" + bytes(MAX_RECORD_BYTES), TrustError),
    ):
        with pytest.raises(kind):
            await client.put_record(KEY, value)
    for key in ("/other/x", "/pk/x", "/ipns/x", "plain", "/test-ns", "//x", ""):
        with pytest.raises(InputError):
            await client.put_record(key, b"1:x")
        with pytest.raises(InputError):
            await client.get_record(key)


async def test_a_server_stores_and_a_reader_returns_validated_values_only(swarm: Swarm) -> None:
    with trio.fail_after(LIMIT):
        async with swarm(3) as (server, liar, reader):
            for key, value in (
                (KEY, b"1:bad"),
                (KEY, b"junk"),
                (KEY, b"1:bug"),
                (KEY, b"1:" + bytes(20_000)),
                ("/other/x", b"1:x"),
                ("plain", b"1:x"),
                (KEY + "x" * 200, b"1:x"),
            ):
                assert not await _send(liar, server, key, value)
            assert not _stored(server)
            _stored(liar)[KEY.encode()] = _forged(liar, KEY, b"9:bad")  # the liar serves it all the same
            assert await reader.get_record(KEY) is None
            await server.put_record(KEY, b"3:good")
            assert await reader.get_record(KEY) == b"3:good"


async def test_older_value_does_not_replace_a_newer_one_at_a_server(swarm: Swarm) -> None:
    with trio.fail_after(LIMIT):
        async with swarm(2) as (server, other):
            assert await _send(other, server, KEY, b"5:x")
            assert not await _send(other, server, KEY, b"4:x")
            assert await _send(other, server, KEY, b"5:x")
            assert await server.get_record(KEY) == b"5:x"


async def test_client_mode_nodes_stay_out_of_routing_tables(pair: tuple[Overlay, Overlay]) -> None:
    server, client = pair
    async with open_overlay(config(9)) as third:
        for each in (client, third):
            await each.bootstrap(server.addrs)
            assert await each.get_record(KEY) is None
        while server.statistics().routing_table == 0:
            await trio.sleep(0.02)
        await trio.sleep(0.2)
        table = server._dht.service.routing_table
        assert table.peer_in_table(parse_peer_id(third.peer_id))
        assert not table.peer_in_table(parse_peer_id(client.peer_id))


async def test_put_alone_says_that_nobody_stored_it() -> None:
    async with open_overlay(config(1)) as node:
        with pytest.raises(NetworkError) as caught:
            await node.put_record(KEY, b"1:x")
        assert caught.value.code == "not_stored"
        assert await node.get_record(KEY) == b"1:x"
        with pytest.raises(NetworkError):
            await node.provide(bytes(32))


async def test_a_renewal_goes_where_the_record_is(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[bytes] = []
    closest = dht.Dht._closest

    async def count(self: dht.Dht, raw: bytes) -> Any:
        lookups.append(raw)
        return await closest(self, raw)

    monkeypatch.setattr(dht.Dht, "_closest", count)
    with trio.fail_after(LIMIT):
        async with swarm(dht.K // 2 + 2) as (first, node, *others):
            await node.put_record(KEY, b"1:x")
            lookups.clear()
            await node.put_record(KEY, b"2:x")
            assert not lookups
            assert {_held(each) for each in (first, *others)} == {b"2:x"}
            for each in others[len(others) // 3 :]:
                await each._close()
            await node.put_record(KEY, b"3:x")
            assert lookups == [KEY.encode()], "it did not look for others when most of them were gone"
            assert _held(first) == b"3:x"


async def test_providers_are_deduplicated(swarm: Swarm) -> None:
    with trio.fail_after(LIMIT):
        async with swarm(5) as nodes:
            digest = bytes(range(32))
            await nodes[1].provide(digest)
            await nodes[2].provide(digest)
            both = sorted([nodes[1].peer_id, nodes[2].peer_id])
            for asker in (nodes[0], nodes[3], nodes[4]):
                assert sorted(await asker.providers(digest)) == both
            assert await nodes[1].providers(digest) == (nodes[2].peer_id,)
            assert await nodes[1].providers(bytes(32)) == ()
            with pytest.raises(InputError):
                await nodes[1].provide(b"short")


async def test_all_holders_of_announcements_are_asked_on_demand(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where peers come and go, each of the closest may know other providers."""
    monkeypatch.setattr(dht, "QUORUM", 1)
    with trio.fail_after(LIMIT):
        async with swarm(6) as (asker, *holders):
            digest = bytes(range(32))
            for holder in holders:
                own = PeerInfo(parse_peer_id(holder.peer_id), [])
                holder._dht.service.provider_store.add_provider(b"\x12\x20" + digest, own)
            found = await asker.providers(digest, all_holders=True)
            assert sorted(found) == sorted(holder.peer_id for holder in holders)


async def test_an_announcement_that_a_busy_server_drops_is_not_made(pair: tuple[Overlay, Overlay]) -> None:
    server, client = pair
    digest = bytes(range(32))
    limiter = server._dht.service._inbound_limiter
    others = [object() for _ in range(limiter.total_tokens)]
    for each in others:
        limiter.acquire_on_behalf_of_nowait(each)
    with trio.fail_after(LIMIT):
        with pytest.raises(NetworkError) as caught:
            await client.provide(digest)
        assert caught.value.code == "not_stored"
        for each in others:
            limiter.release_on_behalf_of(each)
        while not await server.providers(digest):
            with suppress(NetworkError):  # the server may still count those that it turned away
                await client.provide(digest)
        assert await server.providers(digest) == (client.peer_id,)


async def test_provides_are_paced_below_what_servers_drop(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dht.PROVIDES_PER_WINDOW < 10
    assert dht.PROVIDE_WINDOW > 10
    monkeypatch.setattr(dht, "PROVIDE_WINDOW", 1.5)
    with trio.fail_after(LIMIT):
        async with swarm(2) as (_, node):
            started = trio.current_time()
            for number in range(dht.PROVIDES_PER_WINDOW + 1):
                await node.provide(bytes([number]) * 32)
            assert trio.current_time() - started >= 1.5
            await trio.sleep(1.6)
            await node.provide(bytes(32))  # long after the others: nothing to wait for


async def test_find_a_peer_by_id_alone(swarm: Swarm) -> None:
    with trio.fail_after(LIMIT):
        async with swarm(4) as nodes:
            newcomer = parse_peer_id(nodes[3].peer_id)
            while not nodes[0]._dht.is_neighbour(newcomer):
                await trio.sleep(0.01)
            await nodes[2].disconnect(nodes[3].peer_id)
            with suppress(PeerStoreError):  # it may not have heard of it yet
                nodes[2]._host.get_peerstore().clear_peerdata(newcomer)
            await nodes[2].connect(nodes[3].peer_id)
            assert nodes[2].is_connected(nodes[3].peer_id)
            stranger = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
            with pytest.raises(NetworkError):
                await nodes[2].connect(stranger)


async def _send(source: Overlay, target: Overlay, key: str, value: bytes) -> bool:
    """PUT_VALUE without the local checks: what a hostile node would send."""
    store = source._dht.service.value_store
    done: bool = await store._store_at_peer(parse_peer_id(target.peer_id), key.encode(), value)
    return done


def _stored(node: Overlay) -> dict[bytes, Any]:
    store: dict[bytes, Any] = node._dht.service.value_store.store
    return store


def _held(node: Overlay) -> bytes:
    return bytes(node._dht.service.value_store.get(KEY.encode()).value)


def _forged(node: Overlay, key: str, value: bytes) -> Any:
    store = node._dht.service.value_store
    store.put(key.encode(), value)
    return store.store.pop(key.encode())
