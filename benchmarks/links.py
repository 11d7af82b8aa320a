"""What a stream costs when it goes directly, through a relay, and through a hole that was punched.

Every host is a network namespace with processes of its own (tests/netlab.py), so this needs Linux and root. The figures
are ratios to plain TCP between two of the hosts on the internet, in the same round.
"""

from __future__ import annotations

import statistics

import trio

from azu.identity import Identity
from azu.overlay import Overlay, OverlayConfig, OverlayStream, Reach, RelayLimits, open_overlay
from benchmarks.processes import Process, Start
from tests.netlab import Lab, Nat

__all__ = ["End", "measure_links"]

ECHO, SINK = "/benchmarks/echo", "/benchmarks/sink"
LISTEN = ("/ip4/0.0.0.0/tcp/4001",)
TCP_ECHO, TCP_SINK = 5001, 5002  # ports of the plain TCP servers
MESSAGE = 8 << 10  # bytes of a round trip: the activations of one token in a model of 4096 in float16
CHUNK = 1 << 18
PATIENCE_S = 60.0

Stream = OverlayStream | trio.SocketStream


async def _echo(stream: Stream) -> None:
    while data := await stream.receive_some(65_536):
        await stream.send_all(data)


async def _sink(stream: Stream) -> None:
    while await stream.receive_some(CHUNK):
        pass
    await stream.send_all(b"!")


async def _round_trip(stream: Stream, count: int) -> float:
    """The median of so many round trips, in seconds, after as many that do not count."""
    times = []
    for _ in range(2 * count):
        started = trio.current_time()
        await stream.send_all(bytes(MESSAGE))
        left = MESSAGE
        while left:
            left -= len(await stream.receive_some(left))
        times.append(trio.current_time() - started)
    return statistics.median(times[count:])


async def _send(stream: Stream, size: int) -> float:
    """Bytes per second, until the other side has read all of it."""
    data = bytes(CHUNK)
    started = trio.current_time()
    for _ in range(size // CHUNK):
        await stream.send_all(data)
    await stream.send_eof()
    assert await stream.receive_some(1) == b"!", "not all of it arrived"
    return size / (trio.current_time() - started)


class End:
    """One host's process: a node, and plain TCP servers beside it."""

    def __init__(self, nursery: trio.Nursery, bootstrap: list[str], server: bool) -> None:
        self._nursery = nursery
        self._bootstrap = bootstrap
        relay = None if bootstrap else RelayLimits()
        self._config = OverlayConfig(Identity.generate().seed, LISTEN, server, relay=relay)
        self._overlay: Overlay

    async def start(self) -> tuple[str, tuple[str, ...]]:
        """Start everything: peer id and addresses."""
        await self._nursery.start(self._run)
        for port, handler in ((TCP_ECHO, _echo), (TCP_SINK, _sink)):
            await self._nursery.start(trio.serve_tcp, handler, port)
        return self._overlay.peer_id, self._overlay.addrs

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        async with open_overlay(self._config) as self._overlay:
            self._overlay.handle(ECHO, _echo)
            self._overlay.handle(SINK, _sink)
            if self._bootstrap:
                await self._overlay.bootstrap(self._bootstrap)
            task_status.started()
            await trio.sleep_forever()

    async def reach(self, wanted: str) -> tuple[str, ...]:
        """Wait until it has found out how others reach it, which must be as wanted; its addresses then."""
        with trio.fail_after(PATIENCE_S):
            while self._overlay.finding.reach is not Reach[wanted] or not self._overlay.finding.relays:  # noqa: ASYNC110
                await trio.sleep(0.05)
        return self._overlay.addrs

    async def azu(self, peer_id: str, addrs: tuple[str, ...], count: int, size: int) -> tuple[bool, float, float]:
        """Whether the streams to a peer were relayed; seconds of a round trip, bytes per second."""
        async with await self._overlay.open_stream(peer_id, ECHO, addrs=addrs) as stream:
            seconds = await _round_trip(stream, count)
        async with await self._overlay.open_stream(peer_id, SINK, addrs=addrs) as stream:
            return stream.is_relayed, seconds, await _send(stream, size)

    async def tcp(self, address: str, count: int, size: int) -> tuple[float, float]:
        """The same with plain TCP."""
        async with await trio.open_tcp_stream(address, TCP_ECHO) as stream:
            seconds = await _round_trip(stream, count)
        async with await trio.open_tcp_stream(address, TCP_SINK) as stream:
            return seconds, await _send(stream, size)


class _Pair:
    """Two ends that are connected in one way."""

    def __init__(self, one: Process, other: Process, peer_id: str, addrs: tuple[str, ...], relayed: bool) -> None:
        self._one, self._other = one, other
        self._arguments = peer_id, addrs
        self._relayed = relayed

    async def measure(self, count: int, size: int) -> tuple[float, float]:
        relayed, seconds, rate = await self._one.ask("azu", *self._arguments, count, size)
        assert relayed is self._relayed, "the streams went another way"
        return seconds, rate


async def measure_links(start: Start, rounds: int, count: int, size: int) -> dict[str, list[tuple[float, float]]]:
    """For each way and round: the seconds of a round trip (median of `count`), and the rate in bytes per second."""
    with Lab() as lab:
        relays: list[str] = []
        for _ in range(2):  # of which one alone could not tell what kind of router somebody is behind
            relays += (await start(End, [], True, host=lab.public_host()).ask("start"))[1]
        hosts = [lab.public_host(), lab.public_host()]
        one, other = [start(End, relays, True, host=host) for host in hosts]
        await one.ask("start")
        peer_id, addrs = await other.ask("start")
        pairs = {"direct": _Pair(one, other, peer_id, addrs, False)}
        pairs["relayed"] = await _homes(lab, start, relays, "symmetric", "RELAYED")
        pairs["hole punched"] = await _homes(lab, start, relays, "port-restricted", "PUNCHABLE")
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(rounds):
            found.setdefault("plain TCP", []).append(await one.ask("tcp", hosts[1].address, count, size))
            for name, pair in pairs.items():
                found.setdefault(name, []).append(await pair.measure(count, size))
        return found


async def _homes(lab: Lab, start: Start, relays: list[str], nat: Nat, reach: str) -> _Pair:
    one, other = (start(End, relays, False, host=lab.home(nat).hosts[0]) for _ in range(2))
    await one.ask("start")
    peer_id, _ = await other.ask("start")
    await one.ask("reach", reach)
    return _Pair(one, other, peer_id, await other.ask("reach", reach), reach == "RELAYED")
