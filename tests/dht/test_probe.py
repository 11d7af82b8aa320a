"""Ping and identify against a real peer, and the identify message out of hostile bytes."""

from __future__ import annotations

import contextlib

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.identity.identify.pb.identify_pb2 import Identify

from azu.dht.probe import identify, parse_identified, ping
from azu.errors import NetworkError, ProtocolError
from azu.overlay import OverlayStream, open_overlay
from tests.dht.swarm import LIMIT, config


@given(st.text(max_size=200), st.lists(st.text(max_size=40), max_size=8), st.binary(max_size=300))
def test_it_reads_what_protobuf_writes(agent: str, protocols: list[str], other: bytes) -> None:
    message = Identify(agent_version=agent, protocols=protocols, public_key=other, listen_addrs=[other, other])
    found = parse_identified(message.SerializeToString())
    assert (found.agent, found.protocols) == (agent, tuple(protocols))


@given(st.binary(max_size=200))
def test_hostile_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert all(isinstance(each, str) for each in parse_identified(data).protocols)


@pytest.mark.parametrize(
    "data", [b"\x32", b"\x32\x05abc", b"\x80" * 11, b"\x09short", b"\x0b\x01", b"\x32" + b"\xff" * 9]
)
def test_truncated_messages(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_identified(data)


async def test_a_real_peer() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1, agent="azu-node/9.9")) as peer, open_overlay(config(2, agent="us")) as us:
            await us.connect(peer.peer_id, peer.addrs)
            pong = await ping(us, peer.peer_id, timeout=LIMIT)
            assert (0 < pong.rtt < LIMIT, pong.route) == (True, "direct")
            found = await identify(us, peer.peer_id, timeout=LIMIT)
            assert "/ipfs/ping/1.0.0" in found.protocols
            assert found.agent


async def test_peers_that_do_not_answer_as_they_should() -> None:
    async def stare(stream: OverlayStream) -> None:
        await trio.sleep_forever()

    async def boast(stream: OverlayStream) -> None:
        await stream.send_all(b"\xff\xff\xff\x7f")  # a message of 256 MiB follows

    async def leave(stream: OverlayStream) -> None:
        return

    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as peer, open_overlay(config(2)) as us:
            await us.connect(peer.peer_id, peer.addrs)
            peer.handle("/ipfs/ping/1.0.0", stare)
            with pytest.raises(NetworkError, match=r"did not answer within 0\.2 s"):
                await ping(us, peer.peer_id, timeout=0.2)
            peer.handle("/ipfs/ping/1.0.0", leave)
            with pytest.raises(NetworkError, match="before its answer"):
                await ping(us, peer.peer_id, timeout=LIMIT)
            peer.handle("/ipfs/id/1.0.0", boast)
            with pytest.raises(ProtocolError, match="describes itself in 268435455 bytes"):
                await identify(us, peer.peer_id, timeout=LIMIT)
