"""Nodes behind home routers: found out about, relayed, and connected directly where holes can be punched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import pytest
import trio

from azu.identity import Identity
from azu.overlay import Overlay, OverlayConfig, OverlayStream, Reach, RelayLimits, open_overlay
from azu.overlay.nat import traversal
from tests.netlab import Home, Host, Lab, Nat, laboratory
from tests.overlay.nat.routers import Table, natpmp

lab = pytest.fixture(laboratory)

ECHO = "/test/echo"
PATIENCE = 60.0
MIB = 1 << 20


async def echo(stream: OverlayStream) -> None:
    while data := await stream.receive_some(65_536):
        await stream.send_all(data)


class Node:
    """An overlay on a host of the laboratory, which runs in a thread of its own: a thread is in one namespace."""

    def __init__(self, host: Host, config: dict[str, Any], bootstrap: list[str]) -> None:
        self._host, self._config, self._bootstrap = host, config, bootstrap
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failure: BaseException | None = None
        self._thread.start()

    def ready(self) -> Self:
        """Wait until it has started."""
        assert self._ready.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure
        return self

    def end(self) -> None:
        """Begin to stop."""
        assert self._ready.wait(PATIENCE)
        if self.failure is None:
            trio.from_thread.run_sync(self._ended.set, trio_token=self._token)

    def join(self) -> None:
        """Wait until it has stopped."""
        self._thread.join(PATIENCE)

    def run(self, function: Callable[[Overlay], Awaitable[Any]]) -> Any:
        """Run this with the overlay, in its thread, once it has started."""
        self.ready()

        async def bounded() -> Any:
            with trio.fail_after(PATIENCE):
                return await function(self.overlay)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def reach(self, *wanted: Reach) -> Any:
        """Wait until it has found out, and return what."""

        async def wait(overlay: Overlay) -> Any:
            while overlay.finding.reach not in wanted:
                await trio.sleep(0.05)
            while wanted[0] in (Reach.PUNCHABLE, Reach.RELAYED) and not overlay.finding.relays:
                await trio.sleep(0.05)
            return overlay.finding

        return self.run(wait)

    @property
    def addresses(self) -> list[str]:
        async def told(overlay: Overlay) -> list[str]:  # in its namespace, whose interfaces count
            return list(overlay.addrs)

        found: list[str] = self.run(told)
        return found

    def _run(self) -> None:
        try:
            with self._host.entered():
                trio.run(self._main)
        except BaseException as error:
            self.failure = error
            self._ready.set()

    async def _main(self) -> None:
        self._token, self._ended = trio.lowlevel.current_trio_token(), trio.Event()
        config = OverlayConfig(Identity.generate().seed, ("/ip4/0.0.0.0/tcp/4001",), **self._config)
        async with open_overlay(config) as self.overlay:
            self.overlay.handle(ECHO, echo)
            if self._bootstrap:
                await self.overlay.bootstrap(self._bootstrap)
            self._ready.set()
            await self._ended.wait()


class Internet:
    """A laboratory with two bootstrap nodes that relay. Nodes start, and stop, at the same time."""

    def __init__(self, lab: Lab, limits: RelayLimits) -> None:
        self.lab = lab
        self._nodes: list[Node] = []
        self._bootstrap: list[str] = []
        self.relays = [self.start(lab.public_host(), relay=limits) for _ in range(2)]
        self._bootstrap = [each.ready().addresses[0] for each in self.relays]

    def start(self, host: Host, **config: Any) -> Node:
        """Begin to start a node."""
        self._nodes.append(Node(host, config, self._bootstrap))
        return self._nodes[-1]

    def at_home(self, nat: Nat, **config: Any) -> tuple[Node, Host]:
        home = self.lab.home(nat)
        return self.start(home.hosts[0], server=False, **config), home.router

    def stop(self) -> None:
        for each in self._nodes:
            each.end()
        for each in self._nodes:
            each.join()

    def relayed(self) -> int:
        """Bytes that the relays have carried."""

        async def carried(overlay: Overlay) -> int:
            statistics = overlay.relay_statistics()
            assert statistics is not None
            return statistics.carried

        return sum(each.run(carried) for each in self.relays)


@contextmanager
def internet(lab: Lab, limits: RelayLimits = RelayLimits()) -> Iterator[Internet]:  # noqa: B008 - frozen
    net = Internet(lab, limits)
    try:
        yield net
    finally:
        net.stop()


def send_a_mib(source: Node, target: Node) -> bool:
    """Send a MiB there and back; whether that went directly."""
    peer_id, addresses = target.ready().overlay.peer_id, target.addresses

    async def send(overlay: Overlay) -> bool:
        opened = await overlay.open_stream(peer_id, ECHO, addrs=addresses)
        async with opened as stream, trio.open_nursery() as tasks:
            tasks.start_soon(stream.send_all, bytes(MIB))
            left = MIB
            while left:
                data = await stream.receive_some(left)
                assert data
                left -= len(data)
            return not stream.is_relayed

    return bool(source.run(send))


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
