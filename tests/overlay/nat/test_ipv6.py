"""IPv6 alone: what a node finds out about itself, and how others reach it."""

from __future__ import annotations

import pytest

from azu.overlay import Reach
from azu.overlay.nat.reachability import beyond
from tests.netlab import Lab, laboratory
from tests.netlab6 import public_host6, put_behind_firewall
from tests.overlay.nat.internet import internet, send_a_mib

lab = pytest.fixture(laboratory)


def test_who_is_asked_how_we_are_reached() -> None:
    near, v4, v6 = "/ip4/192.168.1.2/tcp/1", "/ip4/25.1.2.3/tcp/1", "/ip6/2a00:1::1/tcp/1"
    assert beyond({"a": near, "b": v6, "c": "", "d": v4}) == ["d"], "IPv6 does not tell what IPv4 lets in"
    assert beyond({"a": near, "b": v6, "c": "/ip6/fd00::1/tcp/1"}) == ["b"]
    assert not beyond({"a": near})


LISTEN = ("/ip6/::/tcp/4001",)


def test_over_ipv6_alone_nodes_are_reached_relayed_and_dialled_back(lab: Lab) -> None:
    relays = [public_host6(lab)[0] for _ in range(2)]
    with internet(lab, hosts=relays, listen=LISTEN) as net:
        host, address = public_host6(lab)
        hidden_host, hidden_address = public_host6(lab)
        put_behind_firewall(hidden_host)
        public, hidden = net.start(host, listen=LISTEN), net.start(hidden_host, listen=LISTEN, server=False)
        assert public.reach(Reach.PUBLIC).external == (f"/ip6/{address}/tcp/4001",)
        hidden.reach(Reach.RELAYED)
        told = hidden.addresses
        assert any(each.startswith(f"/ip6/{hidden_address}/tcp/4001/p2p/") for each in told)
        assert any("/p2p-circuit/" in each for each in told)
        assert not any(each.startswith(("/ip6/fe80", "/ip4/")) for each in told)
        assert send_a_mib(hidden, public)
        assert send_a_mib(public, hidden), "who is reachable is dialled back"
