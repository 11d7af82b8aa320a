"""Nodes behind home routers: found out about, relayed, and connected directly where holes can be punched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio

from azu.overlay import Overlay, Reach
from azu.overlay.nat import traversal
from tests.netlab import Home, Lab, laboratory
from tests.overlay.nat.internet import ECHO, MIB, PATIENCE, Node, internet, send_a_mib
from tests.overlay.nat.routers import Table, natpmp

lab = pytest.fixture(laboratory)


def streams_before_and_after(source: Node, target: Node) -> tuple[bool, bool]:
    """Open a stream at once, and one when there is a direct connection; whether each of them is relayed."""
    peer_id, addresses = target.ready().overlay.peer_id, target.addresses

    async def open_both(overlay: Overlay) -> tuple[bool, bool]:
        async with await overlay.open_stream(peer_id, ECHO, addrs=addresses) as before:
            await overlay.until_direct(peer_id)
            async with await overlay.open_stream(peer_id, ECHO) as after:
                return before.is_relayed, after.is_relayed

    relayed: tuple[bool, bool] = source.run(open_both)
    return relayed


def test_behind_port_restricted_routers_a_hole_is_punched(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with internet(lab) as net:
        (one, one_address), (other, other_address), (hasty, _) = [net.at_home("port-restricted") for _ in range(3)]
        for node in (one, other, hasty):
            assert len(node.reach(Reach.PUNCHABLE).relays) >= 1
        assert send_a_mib(one, other), "it went through the relay"
        before = net.relayed()
        assert send_a_mib(other, one)
        assert net.relayed() - before < 10_000, "the relay carried it"
        assert lab.bytes_between(one_address, other_address) > 4 * MIB
        monkeypatch.setattr(traversal, "_PUNCH_SECONDS", 0.0)
        assert streams_before_and_after(hasty, other) == (True, False)


def test_behind_symmetric_routers_the_relay_carries_it(lab: Lab) -> None:
    with internet(lab) as net:
        (one, one_address), (other, other_address) = net.at_home("symmetric"), net.at_home("symmetric")
        for node in (one, other):
            node.reach(Reach.RELAYED)
        assert not send_a_mib(one, other)
        assert net.relayed() > 2 * MIB
        assert lab.bytes_between(one_address, other_address) < 10_000


def test_what_each_kind_of_router_lets_through(lab: Lab) -> None:
    with internet(lab) as net:
        public = net.start(lab.public_host())
        (open_one, _), (hidden, _) = net.at_home("full-cone"), net.at_home("symmetric")
        assert public.reach(Reach.PUBLIC).external
        open_one.reach(Reach.PUBLIC)
        hidden.reach(Reach.RELAYED)
        assert send_a_mib(public, open_one)
        assert send_a_mib(hidden, open_one)
        assert send_a_mib(public, hidden), "who is reachable is dialled back"


def test_a_router_that_maps_ports_makes_its_home_reachable(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "azu.overlay")
    with internet(lab) as net:
        home = lab.home("symmetric", hosts=2)
        table = Table(home)
        with serving(home, partial(natpmp, home, table)):
            silent = net.start(home.hosts[1], server=False, port_mapping=False)
            one, (other, _) = net.start(home.hosts[0], server=False), net.at_home("symmetric")
            silent.reach(Reach.RELAYED)
            assert one.reach(Reach.MAPPED).external == (f"/ip4/{home.address}/tcp/4001",)
            other.reach(Reach.RELAYED)
            before = net.relayed()
            assert send_a_mib(other, one)
            assert net.relayed() - before < 10_000, "the relay carried it"
            # Who has switched mapping off was the first to know that it needs one.
            assert "port mapping is switched off: the router is not asked for a port" in caplog.messages
            assert silent.reach(Reach.RELAYED, Reach.MAPPED).reach == Reach.RELAYED
            assert not table.inside(home.hosts[1].address, 4001)


@contextmanager
def serving(home: Home, server: Callable[..., Awaitable[None]]) -> Iterator[None]:
    """Run a server in a home's router, in a thread of its own."""
    started, ended = threading.Event(), threading.Event()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(server)
            started.set()
            await trio.to_thread.run_sync(ended.wait)
            nursery.cancel_scope.cancel()

    def run() -> None:
        with home.router.entered():
            trio.run(main)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield
    finally:
        ended.set()
        thread.join(PATIENCE)
