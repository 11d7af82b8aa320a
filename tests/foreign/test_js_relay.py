"""Circuit relay v2: js-libp2p at each of a circuit's three corners."""

from __future__ import annotations

import dataclasses

import trio

from azu.overlay import Overlay, RelayLimits, open_overlay
from tests.foreign.conftest import OpenJs, node_config
from tests.overlay.conftest import LIMIT, LOOPBACK, echo
from tests.overlay.nat.corners import exchange

SIZE = 1 << 20


async def test_js_uses_a_relay_of_ours(open_js: OpenJs, node: Overlay) -> None:
    """As a listener that azu and js dial, both through a node that relays."""
    relaying = dataclasses.replace(node_config(2), relay=RelayLimits())
    with trio.fail_after(LIMIT):
        async with open_overlay(relaying) as relay, open_js() as listener, open_js() as dialler:
            await listener.call("dial", addr=relay.addrs[0])
            [address] = await listener.call("reserve", addr=f"{relay.addrs[0]}/p2p-circuit")
            assert address == f"{relay.addrs[0]}/p2p-circuit/p2p/{listener.peer_id}"

            assert await dialler.call("dial", addr=address) == listener.peer_id
            assert listener.peer_id in [peer for peer, _ in await dialler.call("connections")]
            got = await dialler.call("echo", peer=listener.peer_id, size=SIZE)  # its DHT may have dialled it directly
            assert got["received"] == got["sent"]
            assert got["count"] == SIZE

            started = trio.current_time()
            await node.connect(listener.peer_id, [address])
            assert await node.ping(listener.peer_id) > 0
            assert trio.current_time() - started < 5, "waited for a hole that this peer cannot punch"
            async with await node.open_stream(listener.peer_id, "/test/echo") as stream:
                assert stream.is_relayed
                assert await exchange(stream, SIZE) == SIZE
            statistics = relay.relay_statistics()
            assert statistics is not None
            assert statistics.reservations == 1
            assert statistics.circuits >= 1
            assert statistics.carried > 2 * SIZE


async def test_we_use_a_relay_of_js(open_js: OpenJs) -> None:
    """As a listener that js dials: what it is told through the relay makes it known to js as any other peer."""
    with trio.fail_after(LIMIT):
        async with (
            open_overlay(dataclasses.replace(node_config(1), listen=())) as listener,
            open_js(relay=True) as relay,
            open_js() as dialler,
        ):
            listener.handle("/test/echo", echo)
            await listener.connect(relay.peer_id, relay.addrs)
            while not listener.peers_with("/libp2p/circuit/relay/0.2.0/hop"):
                await trio.sleep(0.02)
            reservation = await listener._traversal._circuits.reserve(relay.peer_id)
            address = f"{reservation.addresses[0]}/p2p/{listener.peer_id}"
            assert address.startswith(LOOPBACK[0].removesuffix("0"))

            assert await dialler.call("dial", addr=address) == listener.peer_id
            got = await dialler.call("echo", peer=listener.peer_id, size=50_000)  # js-libp2p allows 128 KiB
            assert got["received"] == got["sent"]
            assert got["count"] == 50_000
            while (await dialler.call("known", peer=listener.peer_id))["agent"] != "azu-test/1":
                await trio.sleep(0.02)
