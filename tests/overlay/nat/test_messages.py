"""What strangers put into messages: any bytes at all."""

from __future__ import annotations

import ipaddress
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from azu.errors import AzuError, InputError, NetworkError, ProtocolError
from azu.overlay.addresses import parse_circuit, parse_peer_multiaddr
from azu.overlay.nat.dialing import is_public
from azu.overlay.nat.messages import (
    MAX_ADDRESSES,
    decode_addresses,
    decode_peer,
    encode_addresses,
    read_message,
    write_message,
)

RELAY, PEER = (
    "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp",
    "12D3KooWHdiAxVd8uMQR1hGWXccidmfCwLqcMpGwR6QcTP6QRMuD",
)
KINDS = (HopMessage, StopMessage, HolePunch, Message)


class Wire:
    """A stream whose other end has sent this, in pieces of one size."""

    peer_id = PEER

    def __init__(self, data: bytes, piece: int = 1_000_000) -> None:
        self.data, self.piece = data, piece

    async def receive_some(self, most: int) -> bytes:
        part, self.data = self.data[: min(most, self.piece)], self.data[min(most, self.piece) :]
        return part

    async def send_all(self, data: bytes) -> None:
        self.data += data


def read(data: bytes, kind: type = HopMessage, piece: int = 1_000_000) -> tuple[object, bytes]:
    """The message, and what is left on the wire."""
    wire = Wire(data, piece)
    return run(read_message(wire, kind)), wire.data


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what waits for nothing, without a loop round each of hundreds of examples."""
    with pytest.raises(StopIteration) as caught:
        coroutine.send(None)
    return caught.value.value


@given(data=st.binary(max_size=300), kind=st.sampled_from(KINDS), has_length=st.booleans())
@example(data=b"\xff" * 20, kind=HopMessage, has_length=False)
@example(data=b"", kind=HolePunch, has_length=True)
def test_any_bytes_are_a_message_or_an_error_of_ours(data: bytes, kind: type, has_length: bool) -> None:
    if has_length:
        data = bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data
    try:
        message, _ = read(data, kind)
    except (ProtocolError, NetworkError):
        return
    assert isinstance(message, kind)


@given(size=st.integers(1, 300), piece=st.integers(1, 400), rest=st.binary(max_size=5))
def test_a_message_is_read_to_its_last_byte_and_no_further(size: int, piece: int, rest: bytes) -> None:
    sent = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[bytes(size)])
    wire = Wire(b"")
    run(write_message(wire, sent))
    assert read(wire.data + rest, HolePunch, piece) == (sent, rest)
    with pytest.raises(NetworkError) as caught:
        read(wire.data[:-1], HolePunch, piece)
    assert caught.value.code == "stream_ended"


@pytest.mark.parametrize(
    ("head", "code"), [(b"\x81\x20", "too_large"), (b"\xff\xff\x7f", "too_large"), (b"\xff" * 9, "bad_message")]
)
def test_a_large_message_is_refused_before_it_is_read(head: bytes, code: str) -> None:
    wire = Wire(head + bytes(5_000))
    with pytest.raises(ProtocolError) as caught:
        run(read_message(wire, HopMessage))
    assert caught.value.code == code
    assert len(wire.data) >= 5_000


@given(st.lists(st.binary(max_size=80), max_size=40))
@example([Multiaddr("/ip4/1.2.3.4/tcp/5").to_bytes()] * 3)
@example([Multiaddr("/ip4/1.2.3.4/udp/5/quic-v1").to_bytes(), Multiaddr("/dns4/a.b/tcp/5").to_bytes()])
@example([b"\x29" + bytes(10) + b"\xff\xff\x0a\x00\x00\x01\x06\x00\x05"])
@example([b"\x04\x01\x02\x03\x04\x06\x00\x00"])
@example([b"\xa5\x03\xff\xff\xff\xff\x0f" + bytes(60)])
def test_of_any_bytes_only_tcp_addresses_are_taken(encoded: list[bytes]) -> None:
    found = decode_addresses(encoded)
    assert len(set(found)) == len(found) <= MAX_ADDRESSES
    for each in found:
        _, family, host, tcp, port = each.split("/")
        assert ipaddress.ip_address(host).version == int(family[2:])
        assert tcp == "tcp"
        assert 0 < int(port) < 65_536
        is_public(each)


def test_addresses_survive_the_way_there() -> None:
    told = ["/ip4/25.1.0.1/tcp/4001", f"/ip6/2001:db8::1/tcp/1/p2p/{RELAY}"]
    assert decode_addresses(encode_addresses(told)) == ["/ip4/25.1.0.1/tcp/4001", "/ip6/2001:db8::1/tcp/1"]
    assert decode_addresses([Multiaddr(f"{told[1]}/p2p-circuit/p2p/{PEER}").to_bytes()]) == []
    assert len(encode_addresses(f"/ip4/25.1.0.1/tcp/{port}" for port in range(1, 1_000))) == MAX_ADDRESSES


@given(st.binary(max_size=60))
def test_any_bytes_are_a_peer_or_an_error(raw: bytes) -> None:
    try:
        decode_peer(raw)
    except ProtocolError:
        return
    assert len(raw) in (34, 38)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/25.1.0.1/tcp/1", True),
        ("/ip6/2a00::1/tcp/1", True),
        ("/ip4/10.0.0.1/tcp/1", False),
        ("/ip4/127.0.0.1/tcp/1", False),
        ("/ip4/169.254.1.1/tcp/1", False),
        ("/ip4/100.64.0.1/tcp/1", False),
        ("/ip4/224.0.1.1/tcp/1", False),
        ("/ip6/ff0e::1/tcp/1", False),
        ("/ip6/::ffff:10.0.0.1/tcp/1", False),
        ("/ip6/fe80::1/tcp/1", False),
        ("/dns4/example.org/tcp/1", False),
        ("", False),
    ],
)
def test_what_is_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


def test_the_relay_of_an_address() -> None:
    through = f"/ip4/25.1.0.1/tcp/4001/p2p/{RELAY}/p2p-circuit"
    assert parse_circuit(through) == parse_circuit(f"{through}/p2p/{PEER}") == (RELAY, "/ip4/25.1.0.1/tcp/4001")
    assert parse_peer_multiaddr(f"{through}/p2p/{PEER}") == (PEER, through)


@pytest.mark.parametrize(
    "bad",
    [
        f"/ip4/25.1.0.1/tcp/4001/p2p/{RELAY}",
        f"/p2p-circuit/p2p/{PEER}",
        f"/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        f"/ip4/25.1.0.1/tcp/0/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        f"/ip4/25.1.0.1/udp/1/quic-v1/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        f"/ip4/25.1.0.1/tcp/1/p2p-circuit/p2p/{PEER}",
        "/ip4/25.1.0.1/tcp/1/p2p/12D3/p2p-circuit",
        "/p2p-circuit" * 50,
    ],
)
def test_what_is_no_address_through_a_relay(bad: str) -> None:
    with pytest.raises(InputError):
        parse_circuit(bad)


@given(
    st.lists(st.sampled_from(["/ip4/25.1.0.1", "/tcp/1", "/p2p-circuit", f"/p2p/{RELAY}", f"/p2p/{PEER}"]), max_size=8)
)
def test_circuits_in_circuits_are_not_dialled(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        peer_id, address = parse_peer_multiaddr(text)
    except AzuError:
        return
    assert text == f"{address}/p2p/{peer_id}"
    assert address.count("p2p-circuit") <= 1
