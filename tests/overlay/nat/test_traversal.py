"""Nodes behind home routers: found out about, relayed, and connected directly where holes can be punched."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import pytest
import trio

from azu.identity import Identity
from azu.overlay import Overlay, OverlayConfig, OverlayStream, Reach, RelayLimits, open_overlay
from tests.netlab import Host, Lab, Nat, laboratory

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

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure
        return self

    def __exit__(self, *exc_info: object) -> None:
        trio.from_thread.run_sync(self._ended.set, trio_token=self._token)
        self._thread.join(PATIENCE)

    def run(self, function: Callable[[Overlay], Awaitable[Any]]) -> Any:
        """Run this with the overlay, in its thread."""

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
    """A laboratory with two bootstrap nodes that relay."""

    def __init__(self, lab: Lab, stack: ExitStack, limits: RelayLimits) -> None:
        self.lab, self._stack = lab, stack
        self.publics = [lab.public_host() for _ in range(2)]
        self.relays: list[Node] = []
        for host in self.publics:
            self.relays.append(self.start(host, relay=limits))

    def start(self, host: Host, **config: Any) -> Node:
        bootstrap = [each.addresses[0] for each in self.relays]
        return self._stack.enter_context(Node(host, config, bootstrap))

    def at_home(self, nat: Nat, **config: Any) -> tuple[Node, Host]:
        home = self.lab.home(nat)
        return self.start(home.hosts[0], server=False, **config), home.router

    def relayed(self) -> int:
        """Bytes that the relays have carried."""

        async def carried(overlay: Overlay) -> int:
            statistics = overlay.relay_statistics()
            assert statistics is not None
            return statistics.carried

        return sum(each.run(carried) for each in self.relays)


@contextmanager
def internet(lab: Lab, limits: RelayLimits = RelayLimits()) -> Iterator[Internet]:  # noqa: B008 - frozen
    with ExitStack() as stack:
        yield Internet(lab, stack, limits)


def send_a_mib(source: Node, target: Node) -> bool:
    """Send a MiB there and back; whether that went directly."""
    addresses = target.addresses

    async def send(overlay: Overlay) -> bool:
        opened = await overlay.open_stream(target.overlay.peer_id, ECHO, addrs=addresses)
        async with opened as stream, trio.open_nursery() as tasks:
            tasks.start_soon(stream.send_all, bytes(MIB))
            left = MIB
            while left:
                data = await stream.receive_some(left)
                assert data
                left -= len(data)
            return not stream.is_relayed

    return bool(source.run(send))


def test_behind_port_restricted_routers_a_hole_is_punched(lab: Lab) -> None:
    with internet(lab) as net:
        (one, one_address), (other, other_address) = net.at_home("port-restricted"), net.at_home("port-restricted")
        for node in (one, other):
            assert len(node.reach(Reach.PUNCHABLE).relays) >= 1
        assert send_a_mib(one, other), "it went through the relay"
        before = net.relayed()
        assert send_a_mib(other, one)
        assert net.relayed() - before < 10_000, "the relay carried it"
        assert lab.bytes_between(one_address, other_address) > 4 * MIB


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
        assert public.reach(Reach.PUBLIC).external
        open_one, _ = net.at_home("full-cone")
        open_one.reach(Reach.PUBLIC)
        hidden, _ = net.at_home("symmetric")
        hidden.reach(Reach.RELAYED)
        assert send_a_mib(public, open_one)
        assert send_a_mib(hidden, open_one)
        assert send_a_mib(public, hidden), "who is reachable is dialled back"
