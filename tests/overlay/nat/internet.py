"""A small internet of real nodes: bootstrap nodes that relay, and nodes on hosts of the laboratory."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import trio

from azu.identity import Identity
from azu.overlay import Overlay, OverlayConfig, OverlayStream, Reach, RelayLimits, open_overlay
from tests.netlab import Host, Lab, Nat

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
        config = OverlayConfig(Identity.generate().seed, **{"listen": ("/ip4/0.0.0.0/tcp/4001",), **self._config})
        async with open_overlay(config) as self.overlay:
            self.overlay.handle(ECHO, echo)
            if self._bootstrap:
                await self.overlay.bootstrap(self._bootstrap)
            self._ready.set()
            await self._ended.wait()


class Internet:
    """A laboratory with two bootstrap nodes that relay. Nodes start, and stop, at the same time."""

    def __init__(self, lab: Lab, limits: RelayLimits, hosts: Sequence[Host], listen: Sequence[str]) -> None:
        self.lab = lab
        self._nodes: list[Node] = []
        self._bootstrap: list[str] = []
        self.relays = [self.start(host, relay=limits, listen=tuple(listen)) for host in hosts]
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
def internet(
    lab: Lab,
    limits: RelayLimits = RelayLimits(),  # noqa: B008 - frozen
    *,
    hosts: Sequence[Host] = (),
    listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/4001",),
) -> Iterator[Internet]:
    """hosts: those of the two bootstrap nodes, where others will not do; listen: where these listen."""
    net = Internet(lab, limits, hosts or [lab.public_host() for _ in range(2)], listen)
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
