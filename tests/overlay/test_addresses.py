"""What operators may type, and what a wildcard listener means."""

from __future__ import annotations

import pytest
from multiaddr import Multiaddr

from azu.errors import InputError
from azu.overlay import open_overlay, parse_peer_multiaddr
from azu.overlay.addresses import (
    expand_addresses,
    parse_announced,
    parse_circuit,
    parse_dial_address,
    parse_listen_address,
    parse_peer_id,
)
from azu.overlay.nat.dialing import is_public
from tests.overlay.conftest import config

PEER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
OTHER = "12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq"


@pytest.mark.parametrize("host", ["/ip4/203.0.113.7", "/ip6/2001:db8::1", "/dns4/boot.example.org", "/dns6/a.example"])
def test_splits_address_and_peer(host: str) -> None:
    assert parse_peer_multiaddr(f"{host}/tcp/4001/p2p/{PEER}") == (PEER, f"{host}/tcp/4001")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "boot.example.org:4001",
        "/ip4/203.0.113.7",
        "/ip4/203.0.113.7/tcp/4001",
        "/ip4/203.0.113.777/tcp/4001/p2p/" + PEER,
        "/ip4/203.0.113.7/tcp/70000/p2p/" + PEER,
        "/ip4/203.0.113.7/tcp/0/p2p/" + PEER,
        "/ip4/203.0.113.7/udp/4001/quic-v1/p2p/" + PEER,
        "/ip4/203.0.113.7/tcp/4001/ws/p2p/" + PEER,
        "/ip4/203.0.113.7/tcp/4001/p2p/nonsense",
        "/ip4/203.0.113.7/tcp/4001/p2p/" + PEER[:-3],
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}/p2p-circuit",
        f"/ip4/203.0.113.7/tcp/4001/p2p-circuit/p2p/{OTHER}",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}/p2p-circuit/p2p/{OTHER}",
        f"/ip4/203.0.113.7/udp/4001/p2p/{PEER}/p2p-circuit/p2p/{OTHER}",
        f"/p2p/{PEER}/p2p-circuit/p2p/{OTHER}",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}/p2p/{OTHER}",
        "/nonsense/1/tcp/4001/p2p/" + PEER,
        "/ip4/203.0.113.7/tcp/4001/p2p/" + PEER + "/" * 2000,
        "\x00",
        "/ip4/\ud800/tcp/1/p2p/" + PEER,
    ],
)
def test_malformed_multiaddr_is_an_input_error_with_a_remedy(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_peer_multiaddr(text)
    assert caught.value.remedy
    assert caught.value.code in ("bad_multiaddr", "bad_peer_id")


def test_an_address_through_a_relay() -> None:
    relay = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"
    assert parse_peer_multiaddr(f"{relay}/p2p-circuit/p2p/{OTHER}") == (OTHER, f"{relay}/p2p-circuit")
    assert str(parse_dial_address(f"{relay}/p2p-circuit/p2p/{OTHER}", OTHER)) == f"{relay}/p2p-circuit"
    assert parse_circuit(f"{relay}/p2p-circuit") == (PEER, "/ip4/203.0.113.7/tcp/4001")
    with pytest.raises(InputError, match="no relay"):
        parse_circuit(relay)


def test_dial_address_may_lack_the_peer_but_not_name_another() -> None:
    assert str(parse_dial_address("/ip4/10.0.0.1/tcp/1", PEER)) == "/ip4/10.0.0.1/tcp/1"
    assert str(parse_dial_address(f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}", PEER)) == "/ip4/10.0.0.1/tcp/1"
    with pytest.raises(InputError, match="another peer"):
        parse_dial_address(f"/ip4/10.0.0.1/tcp/1/p2p/{OTHER}", PEER)


def test_listen_address_is_ip_and_tcp() -> None:
    parse_listen_address("/ip6/::/tcp/0")
    for text in ("/dns4/localhost/tcp/1", "/ip4/0.0.0.0/udp/1", f"/ip4/0.0.0.0/tcp/1/p2p/{PEER}"):
        with pytest.raises(InputError):
            parse_listen_address(text)


@pytest.mark.parametrize("text", ["", "x", PEER[:-1], PEER + "1", "0" * 52, "12D3KooW", "é" * 40])
def test_bad_peer_id(text: str) -> None:
    with pytest.raises(InputError):
        parse_peer_id(text)


def test_wildcard_expands_with_loopback_last() -> None:
    listening = [Multiaddr("/ip4/0.0.0.0/tcp/7"), Multiaddr("/ip4/127.0.0.1/tcp/8")]
    texts = [str(each) for each in expand_addresses(listening)]
    assert "/ip4/127.0.0.1/tcp/7" in texts
    assert texts[-1].startswith("/ip4/127.")
    assert not any("0.0.0.0" in text for text in texts)


def test_link_local_addresses_are_told_nobody() -> None:
    listening = [Multiaddr("/ip6/fe80::7/tcp/7"), Multiaddr("/ip6/fd00::7/tcp/7"), Multiaddr("/ip6/2a00::7/tcp/7")]
    assert [str(each) for each in expand_addresses(listening)] == ["/ip6/2a00::7/tcp/7", "/ip6/fd00::7/tcp/7"]
    with pytest.raises(InputError, match="link-local"):
        parse_announced("/ip6/fe80::7/tcp/7")


@pytest.mark.parametrize(
    ("host", "is_outside"),
    [("2a00:1450::1", True), ("fd00::1", False), ("fe80::1", False), ("::1", False), ("2001:db8::1", False)],
)
def test_only_global_ipv6_addresses_are_public(host: str, is_outside: bool) -> None:
    assert is_public(f"/ip6/{host}/tcp/4001") is is_outside


async def test_open_overlay_tells_dialable_addresses() -> None:
    async with open_overlay(config(1, listen=("/ip4/0.0.0.0/tcp/0",))) as node:
        assert node.addrs
        for each in node.addrs:
            peer_id, address = parse_peer_multiaddr(each)
            assert peer_id == node.peer_id
            assert "0.0.0.0" not in address
        assert node.addrs[-1].startswith("/ip4/127.0.0.1/")
