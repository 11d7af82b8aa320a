"""A relay, and nodes around it that come to each other through it: all real, on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status as Codes

from azu.overlay import Overlay, OverlayConfig, OverlayStream, RelayLimits, RelayStatistics, open_overlay
from azu.overlay.addresses import parse_peer_id
from azu.overlay.nat.messages import read_message, write_message
from azu.overlay.nat.reachability import Reach
from azu.overlay.nat.relay import HOP
from tests.overlay.conftest import LIMIT, LOOPBACK, echo

ECHO = "/test/echo"


@asynccontextmanager
async def corners(
    limits: RelayLimits = RelayLimits(),  # noqa: B008 - frozen
    *,
    others: int = 2,
    listen: tuple[str, ...] = (),
    relay: RelayLimits | None = None,
) -> AsyncIterator[list[Overlay]]:
    """[relay, *others], connected, under a deadline; `listen` and `relay` of the others."""
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            hub = await stack.enter_async_context(open_overlay(_config(1, LOOPBACK, limits)))
            nodes = [
                await stack.enter_async_context(open_overlay(_config(2 + index, listen, relay)))
                for index in range(others)
            ]
            for node in nodes:
                node.handle(ECHO, echo)
                await node.connect(hub.peer_id, hub.addrs)
                while listen and node.finding.reach != Reach.LOCAL:  # which lets go of all reservations
                    await trio.sleep(0.02)
            yield [hub, *nodes]


def _config(number: int, listen: tuple[str, ...], relay: RelayLimits | None) -> OverlayConfig:
    return OverlayConfig(number.to_bytes(32, "big"), listen, number == 1, relay=relay)


async def reserve(node: Overlay, relay: Overlay) -> list[str]:
    """Reserve a place; the addresses at which the node can then be dialled."""
    reservation = await node._traversal._circuits.reserve(relay.peer_id)
    return [f"{each}/p2p/{node.peer_id}" for each in reservation.addresses]


async def ask(node: Overlay, relay: Overlay, target: Overlay | None = None) -> tuple[HopMessage, OverlayStream]:
    """Ask for a reservation, or for a circuit to `target`: the answer, and the stream that it came on."""
    stream = await node.open_stream(relay.peer_id, HOP)
    request = HopMessage(type=HopMessage.RESERVE)
    if target is not None:
        request = HopMessage(type=HopMessage.CONNECT)
        request.peer.id = parse_peer_id(target.peer_id).to_bytes()
    await write_message(stream, request)
    return await read_message(stream, HopMessage), stream


async def status(node: Overlay, relay: Overlay, target: Overlay | None = None) -> int:
    """The same without its stream: the answer's status."""
    answer, stream = await ask(node, relay, target)
    await stream.reset()
    assert answer.type == HopMessage.STATUS
    return answer.status


async def accept_raw(stream: OverlayStream) -> None:
    """A handler of STOP that sends back whatever comes through the circuit, without a handshake."""
    await read_message(stream, StopMessage)
    await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Codes.OK))
    await echo(stream)


def relaying(relay: Overlay) -> RelayStatistics:
    statistics = relay.relay_statistics()
    assert statistics is not None
    return statistics


async def until(condition: Callable[[], Any]) -> None:
    """Wait for it; the test's deadline bounds that."""
    while not condition():
        await trio.sleep(0.01)


async def exchange(stream: OverlayStream, size: int) -> int:
    """Send so many bytes and read them back; how many came before the end."""
    count = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send, stream, size)
        while count < size and (data := await stream.receive_some(size - count)):
            count += len(data)
    return count


async def _send(stream: OverlayStream, size: int) -> None:
    for _ in range(size // 10_000):
        await stream.send_all(bytes(10_000))
    await stream.send_all(bytes(size % 10_000))


@asynccontextmanager
async def counted(host: str) -> AsyncIterator[tuple[str, list[trio.SocketStream]]]:
    """(the address of a listener, whom it has accepted and hung up on)."""
    accepted: list[trio.SocketStream] = []

    async def handle(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(lambda task_status: _serve(handle, host, task_status))
        yield f"/ip4/{host}/tcp/{listener.socket.getsockname()[1]}", accepted
        nursery.cancel_scope.cancel()


async def _serve(
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    host: str,
    status: trio.TaskStatus[list[trio.SocketListener]],
) -> None:
    await trio.serve_tcp(handle, 0, host=host, task_status=status)
