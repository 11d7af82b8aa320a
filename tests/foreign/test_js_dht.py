"""js-libp2p as a DHT server among azu nodes: each stores for the other, finds at the other, and harms nothing."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack

import pytest
import trio

from azu.overlay import Overlay, open_overlay
from tests.foreign.conftest import OpenJs, node_config, worker_record
from tests.foreign.js_peer import JsPeer
from tests.overlay.conftest import LIMIT

DIGEST = hashlib.sha256(b"a manifest").digest()


@pytest.fixture
async def mixed(node: Overlay, open_js: OpenJs) -> AsyncIterator[tuple[list[Overlay], JsPeer]]:
    """Three azu nodes and a js-libp2p one, all of them DHT servers that know each other."""
    async with AsyncExitStack() as stack:
        nodes = [node, *[await stack.enter_async_context(open_overlay(node_config(n))) for n in (2, 3)]]
        js = await stack.enter_async_context(open_js(server=True))
        for each in nodes:
            others = [address for other in (*nodes, js) if other is not each for address in other.addrs]
            assert len(await each.bootstrap(others)) == len(nodes)
        while await js.call("routingTable") < len(nodes):
            await trio.sleep(0.02)
        yield nodes, js


async def test_what_js_puts_is_found_by_azu_and_the_other_way_round(mixed: tuple[list[Overlay], JsPeer]) -> None:
    nodes, js = mixed
    key, value = worker_record(100)
    assert await js.call("put", key=key, value=value.hex()) == len(nodes)  # each node acknowledged it
    assert [await each.get_record(key) for each in nodes] == [value] * 3
    newer = worker_record(100, version=1)[1]
    await nodes[2].put_record(key, newer)
    assert [await each.get_record(key) for each in nodes] == [newer] * 3
    assert await js.call("get", key=key) == newer.hex()
    # Of what was found, its selector takes the newest, and it corrects those that hold less.
    assert await js.call("put", key=key, value=value.hex()) == 0
    assert await js.call("get", key=key) == newer.hex()


async def test_providers_and_peers_are_found_by_both(mixed: tuple[list[Overlay], JsPeer]) -> None:
    nodes, js = mixed
    assert await js.call("provide", digest=DIGEST.hex()) == len(nodes)
    await nodes[1].provide(DIGEST)
    both = {js.peer_id, nodes[1].peer_id}
    await until_async(lambda: nodes[0].providers(DIGEST), both)
    await until_async(lambda: js.call("providers", digest=DIGEST.hex()), both)
    # With addresses that lead there.
    await nodes[0].disconnect(js.peer_id)
    await nodes[0].connect(js.peer_id)
    assert await nodes[0].ping(js.peer_id) > 0
    async with open_overlay(node_config(9)) as late:
        await late.bootstrap(nodes[1].addrs)
        found = await js.call("find", peer=late.peer_id)
        assert late.addrs[0].removesuffix(f"/p2p/{late.peer_id}") in found


async def until_async(ask: Callable[[], Awaitable[Iterable[str]]], wanted: set[str]) -> None:
    """An announcement is not acknowledged: it may arrive a moment later."""
    with trio.fail_after(LIMIT):
        while set(await ask()) != wanted:
            await trio.sleep(0.02)


async def test_a_js_server_alone_serves_azu_nodes(open_js: OpenJs) -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_js(server=True) as js,
            open_overlay(node_config(2, server=False)) as one,
            open_overlay(node_config(3, server=False)) as other,
        ):
            assert await one.bootstrap(js.addrs) == await other.bootstrap(js.addrs) == [js.peer_id]
            key, value = worker_record(2)
            await one.put_record(key, value)
            assert await other.get_record(key) == value
            assert await other.get_record(worker_record(3)[0]) is None
            await one.provide(DIGEST)
            await until_async(lambda: other.providers(DIGEST), {one.peer_id})
            await other.connect(one.peer_id)


async def test_forged_records_from_js_are_neither_stored_nor_returned(mixed: tuple[list[Overlay], JsPeer]) -> None:
    nodes, js = mixed
    (key, _), (_, of_another) = worker_record(100), worker_record(101)
    tampered = bytearray(worker_record(100)[1])
    tampered[-1] ^= 1
    for forged in (of_another, bytes(tampered), b"no envelope"):
        # It keeps what it puts, unlike the nodes, and answers with it when it is asked.
        assert await js.call("put", key=key, value=forged.hex()) == 0
        assert [await each.get_record(key) for each in nodes] == [None] * 3
    assert await js.call("put", key="/other/x", value="00") == 0


async def test_look_ups_go_on_when_js_dies(mixed: tuple[list[Overlay], JsPeer]) -> None:
    nodes, js = mixed
    key, value = worker_record(100)
    await nodes[1].put_record(key, value)
    js.kill()
    started = trio.current_time()
    assert await nodes[0].get_record(key) == value
    newer = worker_record(100, version=1)[1]
    await nodes[1].put_record(key, newer)
    assert await nodes[2].get_record(key) == newer
    assert trio.current_time() - started < 15
