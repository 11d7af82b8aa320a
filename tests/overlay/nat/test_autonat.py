"""Dialling back: whom a server dials, and whom it does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from libp2p.host.autonat.pb.autonat_pb2 import Message
from multiaddr import Multiaddr

from azu.errors import NetworkError
from azu.overlay import Overlay, OverlayStream, RelayLimits
from azu.overlay.addresses import parse_peer_id
from azu.overlay.nat.autonat import AUTONAT, may_connect
from azu.overlay.nat.messages import encode_addresses, read_message, write_message
from tests.overlay.conftest import LOOPBACK
from tests.overlay.nat.corners import corners, counted, reserve, until


async def ask_raw(asker: Overlay, server: Overlay, about: Overlay, addresses: list[str]) -> Message | None:
    """The server's answer to any question; None where it resets the stream."""
    question = Message(type=Message.DIAL)
    question.dial.peer.id = parse_peer_id(about.peer_id).to_bytes()
    question.dial.peer.addrs.extend(encode_addresses(addresses))
    async with await asker.open_stream(server.peer_id, AUTONAT) as stream:
        await write_message(stream, question)
        try:
            return await read_message(stream, Message)
        except NetworkError:
            return None


async def answer_to(asker: Overlay, server: Overlay, addresses: list[str]) -> int:
    answer = await ask_raw(asker, server, asker, addresses)
    assert answer is not None
    assert answer.type == Message.DIAL_RESPONSE
    return answer.dialResponse.status


async def test_who_can_be_dialled_is_told_where() -> None:
    async with corners(listen=LOOPBACK) as (server, one, other):
        [own] = one.own_addresses
        closed = "/ip4/127.0.0.1/tcp/1"
        assert await may_connect(one, server.peer_id, [closed, own]) == own
        assert await may_connect(one, server.peer_id, [closed]) is None
        assert await may_connect(one, server.peer_id, list(other.own_addresses)) is None, "somebody else is there"


async def test_only_the_askers_own_address_is_dialled() -> None:
    async with corners(others=1, listen=LOOPBACK) as (server, node), counted("127.0.0.2") as (victim, victims):
        strange = [victim, "/ip4/203.0.113.1/tcp/1", "/ip6/::1/tcp/1", "/dns4/localhost/tcp/1", "/ip4/127.0.0.1/udp/1"]
        assert await answer_to(node, server, strange) == Message.E_DIAL_REFUSED
        assert await answer_to(node, server, []) == Message.E_DIAL_REFUSED
        [own] = node.own_addresses
        assert await answer_to(node, server, [victim, own]) == Message.OK
        assert not victims


async def test_a_server_soon_has_enough_of_one_asker() -> None:
    async with corners(others=1, listen=LOOPBACK) as (server, node), counted("127.0.0.1") as (address, dials):
        answers = [await answer_to(node, server, [address]) for _ in range(8)]
        assert answers == [Message.E_DIAL_ERROR] * 4 + [Message.E_DIAL_REFUSED] * 4
        assert len(dials) == 4


async def test_nobody_asks_for_others() -> None:
    async with corners(listen=LOOPBACK) as (server, one, other):
        assert await ask_raw(one, server, other, list(other.own_addresses)) is None
        await until(lambda: server.statistics().violations == {one.peer_id: 1})


async def test_over_a_circuit_nobody_is_dialled() -> None:
    async with corners(listen=LOOPBACK, relay=RelayLimits()) as (hub, server, asker):
        await asker.connect(server.peer_id, await reserve(server, hub))
        assert await answer_to(asker, server, list(asker.own_addresses)) == Message.E_DIAL_REFUSED


def says(status: int, address: str) -> Callable[[OverlayStream], Awaitable[None]]:
    """A server that dials nobody."""

    async def handle(stream: OverlayStream) -> None:
        await read_message(stream, Message)
        answer = Message(type=Message.DIAL_RESPONSE)
        answer.dialResponse.status = status  # type: ignore[assignment]
        answer.dialResponse.addr = Multiaddr(address).to_bytes()
        await write_message(stream, answer)

    return handle


async def test_what_a_server_says_is_not_taken_on_trust() -> None:
    ours, theirs = "/ip4/25.1.0.1/tcp/4001", "/ip4/25.2.0.1/tcp/4001"
    async with corners(others=3, listen=LOOPBACK, relay=RelayLimits()) as (_, node, *servers):
        for each in servers:
            await node.connect(each.peer_id, each.addrs)
        reachability = node._traversal._reachability
        first, second = servers

        async def ask(*statuses: int) -> tuple[list[str], int]:
            for each, status in zip(servers, statuses, strict=True):
                each.handle(AUTONAT, says(status, ours))
            return await reachability._try([first.peer_id, second.peer_id], [ours])

        assert await ask(Message.OK, Message.OK) == ([ours], 2)
        assert await ask(Message.OK, Message.E_DIAL_ERROR) == ([], 2), "one of two may lie"
        assert await ask(Message.OK, Message.E_DIAL_REFUSED) == ([ours], 1)
        assert await ask(Message.E_INTERNAL_ERROR, Message.E_DIAL_REFUSED) == ([], 0)
        first.handle(AUTONAT, says(Message.OK, theirs))
        assert await may_connect(node, first.peer_id, [ours]) is None, "that is not what was asked"


@pytest.mark.parametrize("garbage", [b"\x02\xff\xff", b"\x00", b"\x02\x08\x01", b"\xff\xff\xff\xff"])
async def test_garbage_is_an_offence_and_no_more(garbage: bytes) -> None:
    async with corners(others=1, listen=LOOPBACK) as (server, node):
        async with await node.open_stream(server.peer_id, AUTONAT) as stream:
            await stream.send_all(garbage)
            assert await stream.receive_some() == b""
        await until(lambda: server.statistics().violations == {node.peer_id: 1})
        assert await may_connect(node, server.peer_id, list(node.own_addresses)) in node.own_addresses
