"""IPv6 on loopback, and names. What needs several machines is in tests/overlay/nat/test_ipv6.py."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio

from azu.errors import NetworkError
from azu.overlay import Overlay, OverlayStream, open_overlay
from tests.overlay.conftest import LIMIT, config, echo, receive_exactly


def why_not() -> str:
    """Why ::1 cannot be used here; empty where it can."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return f"NO IPv6 HERE: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


async def is_served(server: Overlay, address: str) -> bool:
    """Whether a client that knows this address only gets an echo."""
    async with (
        open_overlay(config(9, server=False, listen=())) as client,
        await client.open_stream(server.peer_id, "/test/echo", addrs=[address]) as stream,
    ):
        await stream.send_all(b"hello")
        return await receive_exactly(stream, 5) == b"hello"


async def test_nodes_meet_over_ipv6_and_know_each_others_addresses() -> None:
    seen: list[str] = []

    async def note(stream: OverlayStream) -> None:
        seen.append(stream.remote_ip)
        await stream.send_all(b"x")

    with trio.fail_after(LIMIT):
        async with (
            open_overlay(config(1, listen=("/ip6/::/tcp/0",))) as server,
            open_overlay(config(2, listen=("/ip6/::1/tcp/0",))) as client,
        ):
            assert server.addrs[-1].startswith("/ip6/::1/tcp/")
            assert not any(each.startswith(("/ip4/", "/ip6/fe80")) for each in server.addrs)
            server.handle("/test/note", note)
            await client.bootstrap(server.addrs[-1:])
            async with await client.open_stream(server.peer_id, "/test/note") as stream:
                assert await receive_exactly(stream, 1) == b"x"
            assert seen == ["::1"]
            assert server.remote_address(client.peer_id).startswith("/ip6/::1/tcp/")
            while client.peer_id not in server.servers():
                await trio.sleep(0.01)
            while not server.statistics().routing_table:
                await trio.sleep(0.01)
            await client.put_record("/test-ns/over-ipv6", b"1:x")
            assert await server.get_record("/test-ns/over-ipv6") == b"1:x"


def free_port() -> int:
    """A port that is free in both families."""
    while True:
        with socket.socket(socket.AF_INET6) as v6, socket.socket() as v4:
            v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            v6.bind(("::", 0))
            port: int = v6.getsockname()[1]
            try:
                v4.bind(("0.0.0.0", port))
            except OSError:  # somebody dials from it
                continue
            return port


async def test_each_family_is_listened_to_as_asked() -> None:
    port = free_port()
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1, listen=(f"/ip6/::/tcp/{port}",))) as server:
            server.handle("/test/echo", echo)
            with pytest.raises(NetworkError):
                await is_served(server, f"/ip4/127.0.0.1/tcp/{port}")
            # The port is free in the other family.
            async with open_overlay(config(2, listen=(f"/ip4/0.0.0.0/tcp/{port}",))) as other:
                other.handle("/test/echo", echo)
                assert await is_served(other, f"/ip4/127.0.0.1/tcp/{port}")
                assert await is_served(server, f"/ip6/::1/tcp/{port}")
        async with open_overlay(config(1, listen=(f"/ip4/0.0.0.0/tcp/{port}", f"/ip6/::/tcp/{port}"))) as server:
            server.handle("/test/echo", echo)
            for host in ("/ip4/127.0.0.1", "/ip6/::1"):
                assert await is_served(server, f"{host}/tcp/{port}")


async def test_names_are_those_of_this_system(monkeypatch: pytest.MonkeyPatch) -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as v4, open_overlay(config(2, listen=("/ip6/::1/tcp/0",))) as v6:
            for node in (v4, v6):
                node.handle("/test/echo", echo)
            v4_port, v6_port = (node.addrs[0].split("/")[4] for node in (v4, v6))
            assert await is_served(v4, f"/dns4/localhost/tcp/{v4_port}")
            with pytest.raises(NetworkError, match=r"the name nowhere\.invalid cannot be looked up"):
                await is_served(v4, f"/dns/nowhere.invalid/tcp/{v4_port}")

            # No name server here knows IPv6 addresses, and few hosts files do.
            real = socket.getaddrinfo

            hosts = {socket.AF_INET: ["127.0.0.1"], socket.AF_INET6: ["::1"], socket.AF_UNSPEC: ["::1", "127.0.0.1"]}

            def both(host: Any, port: Any, family: Any = socket.AF_UNSPEC, *rest: Any) -> Sequence[Any]:
                names = hosts[family] if host == "both.example" else [host]
                return [info for each in names for info in real(each, port, socket.AF_UNSPEC, *rest)]

            monkeypatch.setattr(socket, "getaddrinfo", both)
            assert await is_served(v6, f"/dns6/both.example/tcp/{v6_port}")
            assert await is_served(v4, f"/dns/both.example/tcp/{v4_port}"), "only one of its addresses answers"
            with pytest.raises(NetworkError):
                await is_served(v4, f"/dns6/both.example/tcp/{v4_port}")


@pytest.mark.parametrize("address", ["/ip6/2001:db8::7/tcp/4001", "/dns6/boot.example.org/tcp/4001"])
async def test_what_is_announced_is_told_others(address: str) -> None:
    with trio.fail_after(LIMIT):
        async with (
            open_overlay(replace(config(1, listen=("/ip6/::1/tcp/0",)), announce=(address,))) as node,
            open_overlay(config(2)) as other,
        ):
            assert node.addrs == (f"{address}/p2p/{node.peer_id}",)
            here = str(node._host.get_transport_addrs()[0])
            await other.connect(node.peer_id, [here])
            while f"{address}/p2p/{node.peer_id}" not in other.servers().get(node.peer_id, ()):
                await trio.sleep(0.01)
