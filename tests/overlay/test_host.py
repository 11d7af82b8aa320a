"""Lifecycle, bootstrap, and peers that die."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from libp2p.network.exceptions import SwarmException

from azu.errors import InputError, NetworkError
from azu.overlay import Overlay, open_overlay
from azu.overlay.addresses import parse_peer_id
from tests.overlay.conftest import LIMIT, config, echo, receive_exactly

ROOT = Path(__file__).parents[2]
CHILD = """
import trio
from azu.overlay import OverlayConfig, open_overlay

async def main():
    async with open_overlay(OverlayConfig(bytes([77]) * 32, ("/ip4/127.0.0.1/tcp/0",))) as node:
        async def echo(stream):
            while data := await stream.receive_some():
                await stream.send_all(data)
        node.handle("/test/echo", echo)
        print(node.addrs[0], node.peer_id, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_killed_peer_ends_its_streams() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            line = await trio.to_thread.run_sync(child.stdout.readline, abandon_on_cancel=True)
            address, peer_id = line.split()
            with trio.fail_after(LIMIT):
                async with open_overlay(config(1, server=False)) as node:
                    stream = await node.open_stream(peer_id, "/test/echo", addrs=[address])
                    await stream.send_all(b"hi")
                    assert await receive_exactly(stream, 2) == b"hi"
                    child.send_signal(signal.SIGKILL)
                    assert await stream.receive_some() == b""
                    while node.is_connected(peer_id):
                        await trio.sleep(0.01)
                    with pytest.raises(NetworkError):
                        await stream.send_all(b"x")
                    with pytest.raises(NetworkError):
                        await node.open_stream(peer_id, "/test/echo")
        finally:
            child.kill()


async def test_bootstrap_down_names_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with open_overlay(config(1)) as node, open_overlay(config(2)) as other:
        dead = f"/ip4/127.0.0.1/tcp/{port}/p2p/{other.peer_id}"
        with pytest.raises(NetworkError) as caught:
            await node.bootstrap([dead])
        assert f"/ip4/127.0.0.1/tcp/{port}" in str(caught.value)
        assert "refused" in str(caught.value).lower()
        assert caught.value.remedy
        with pytest.raises(InputError):
            await node.bootstrap(["nonsense"])
        assert await node.bootstrap([dead, *other.addrs]) == [other.peer_id]  # one is enough
        assert await node.bootstrap([]) == []
        assert node.statistics().routing_table == 1
        assert node.connected_peers() == (other.peer_id,)


async def test_wrong_identity_is_refused() -> None:
    async with open_overlay(config(1)) as node, open_overlay(config(2)) as other, open_overlay(config(3)) as third:
        address = other.addrs[0].split("/p2p/")[0]
        with pytest.raises(NetworkError):
            await node.connect(third.peer_id, [address])
        await node.connect(other.peer_id, [address])  # without the suffix
        await node.connect(other.peer_id, ["/ip4/127.0.0.1/tcp/1"])  # connected already: nothing is dialled


async def test_first_address_dead_second_answers() -> None:
    async with open_overlay(config(1)) as node, open_overlay(config(2)) as other:
        await node.connect(other.peer_id, ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2", *other.addrs])
        assert node.is_connected(other.peer_id)


async def test_a_closed_connection_leaves_nothing_at_the_server() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as server:
            await trio.testing.wait_all_tasks_blocked(0.2)
            before = trio.lowlevel.current_statistics().tasks_living
            for number in range(3):
                async with open_overlay(config(10 + number, server=False)) as client:
                    await client.bootstrap(server.addrs)
            while trio.lowlevel.current_statistics().tasks_living > before or server.connected_peers():
                await trio.sleep(0.05)
            assert server._swarm._inbound_limiter.borrowed_tokens == 0


async def test_both_dial_at_once() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as one, open_overlay(config(2)) as two:
            for each in (one, two):
                each.handle("/test/echo", echo)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.connect, two.peer_id, two.addrs)
                nursery.start_soon(two.connect, one.peer_id, one.addrs)
            await trio.sleep(0.5)
            for here, there in ((one, two), (two, one)):
                async with await here.open_stream(there.peer_id, "/test/echo") as stream:
                    await stream.send_all(b"x")
                    assert await receive_exactly(stream, 1) == b"x"


async def test_plaintext_and_garbage_on_the_port_harm_nobody() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as node, open_overlay(config(2)) as client:
            node.handle("/test/echo", echo)
            port = int(node.addrs[0].split("/")[4])
            plaintext = b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n"
            for junk in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100_000), plaintext):
                raw = await trio.open_tcp_stream("127.0.0.1", port)
                with trio.move_on_after(1):
                    await raw.send_all(junk)
                    answer = await raw.receive_some()
                    if b"plaintext" in junk:
                        assert b"plaintext" not in answer
                await raw.aclose()
            async with await client.open_stream(node.peer_id, "/test/echo", addrs=node.addrs) as stream:
                await stream.send_all(b"x")
                assert await receive_exactly(stream, 1) == b"x"


async def test_a_connection_that_comes_while_the_others_are_closed_is_not_forgotten() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as one, open_overlay(config(2)) as other, trio.open_nursery() as nursery:
            await one.connect(other.peer_id, other.addrs)
            while not other.is_connected(one.peer_id):
                await trio.sleep(0.01)
            nursery.start_soon(one.disconnect, other.peer_id)
            while other.is_connected(one.peer_id):
                await trio.sleep(0.001)
            await other.connect(one.peer_id, one.addrs)
            await trio.sleep(0.5)  # upstream takes 0.2 s over closing one
            assert one.is_connected(other.peer_id)


async def test_errors_from_the_body_come_out_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_overlay(config(1)):
            raise ZeroDivisionError
    with pytest.raises(InputError):
        async with open_overlay(config(1)):
            raise InputError("x")
    with pytest.RaisesGroup(ZeroDivisionError), trio.CancelScope() as scope:
        async with open_overlay(config(1)), trio.open_nursery() as nursery:

            async def fail() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise ZeroDivisionError

            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked(0.05)
            scope.cancel()


async def test_a_body_that_is_cancelled_can_still_say_goodbye(pair: tuple[Overlay, Overlay]) -> None:
    server, _ = pair
    answered: list[bytes] = []
    with trio.CancelScope() as scope:
        async with open_overlay(config(5)) as node:
            await node.connect(server.peer_id, server.addrs)
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    async with await node.open_stream(server.peer_id, "/test/echo") as stream:
                        await stream.send_all(b"goodbye")
                        answered.append(await stream.receive_some())
    assert answered == [b"goodbye"]


async def test_leaving_by_cancellation_frees_the_port_and_all_tasks() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(2)) as other:
            await trio.testing.wait_all_tasks_blocked(0.2)
            before = trio.lowlevel.current_statistics().tasks_living
            with trio.CancelScope() as scope:
                async with open_overlay(config(1)) as node:
                    port = node.addrs[0].split("/")[4]
                    await node.bootstrap(other.addrs)
                    scope.deadline = trio.current_time() + 0.3  # in the middle of whatever goes on by itself
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            while trio.lowlevel.current_statistics().tasks_living > before:
                await trio.sleep(0.05)
            async with open_overlay(config(3, listen=(f"/ip4/127.0.0.1/tcp/{port}",))) as again:
                await again.bootstrap(other.addrs)


async def test_bad_configuration() -> None:
    with pytest.raises(InputError):
        async with open_overlay(config(1, listen=("nonsense",))):
            pass
    with pytest.raises(NetworkError):
        async with open_overlay(config(1, listen=("/ip4/192.0.2.250/tcp/9",))):
            pass
    assert "seed" not in repr(config(1))


async def test_a_taken_port_is_an_error() -> None:
    async with open_overlay(config(1)) as node:
        port = node.addrs[0].split("/")[4]
        for taken in (f"/ip4/127.0.0.1/tcp/{port}", f"/ip4/0.0.0.0/tcp/{port}"):
            with pytest.raises(NetworkError, match="in use") as caught:
                async with open_overlay(config(2, listen=(taken,))):
                    pass
            assert taken in caught.value.message
            assert caught.value.remedy


async def test_libp2p_is_quiet_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_overlay(config(1)):
        assert not logging.getLogger("libp2p.network.swarm").isEnabledFor(logging.ERROR)
    monkeypatch.setenv("AZU_LIBP2P_LOG", "warning")
    async with open_overlay(config(1)):
        assert logging.getLogger("libp2p.network.swarm").isEnabledFor(logging.WARNING)
    monkeypatch.setenv("AZU_LIBP2P_LOG", "nonsense")
    async with open_overlay(config(1)):
        assert not logging.getLogger("libp2p.network.swarm").isEnabledFor(logging.ERROR)


async def test_look_ups_are_told_why_a_peer_did_not_answer_a_moment_ago(pair: tuple[Overlay, Overlay]) -> None:
    _, client = pair
    with trio.fail_after(LIMIT):
        async with open_overlay(config(3)) as gone:
            peer_id, addresses = gone.peer_id, gone.addrs
        with pytest.raises(NetworkError, match="refused"):
            await client.connect(peer_id, addresses)
        with pytest.raises(SwarmException, match=r"refused \(a moment ago\)"):
            await client._swarm.dial_peer(parse_peer_id(peer_id))
