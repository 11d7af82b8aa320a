"""Direct connections out of relayed ones, and what a hostile end of the exchange can do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from azu.errors import NetworkError
from azu.identity import Identity
from azu.overlay import Overlay, OverlayStream
from azu.overlay.nat import punch, traversal
from azu.overlay.nat.messages import read_message, write_message
from azu.overlay.nat.punch import DCUTR
from azu.overlay.nat.reachability import Finding, Reach
from tests.overlay.conftest import LOOPBACK
from tests.overlay.nat.corners import ECHO, corners, counted, exchange, relaying, reserve, until

Handler = Callable[[OverlayStream], Awaitable[None]]


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.0/9 is; the other half of loopback is not."""
    monkeypatch.setattr(punch, "is_public", lambda address: address.startswith("/ip4/127.0."))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream waits for long for a direct connection that does not come."""
    monkeypatch.setattr(traversal, "_PUNCH_SECONDS", 0.2)


def offer(*addresses: str | bytes) -> HolePunch:
    encoded = [each if isinstance(each, bytes) else Multiaddr(each).to_bytes() for each in addresses]
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=encoded)


def seen_at(node: Overlay, *addresses: str) -> None:
    """Tell a node where the world sees it."""
    node._traversal._reachability.finding = Finding(Reach.PUNCHABLE, (), addresses or node.own_addresses)


@asynccontextmanager
async def relayed(*, dialler: Handler | None = None) -> AsyncIterator[tuple[Overlay, Overlay, Overlay]]:
    """(relay, dialled, dialler); `dialler` is what the dialler does in the exchange, where that is not our own."""
    async with corners(listen=LOOPBACK) as (hub, dialled, source):
        seen_at(dialled)
        seen_at(source)
        if dialler is not None:
            source.handle(DCUTR, dialler)
            source._traversal._puncher.expect = lambda peer_id: None  # type: ignore[method-assign]  # it waits for nothing
        await source.connect(dialled.peer_id, await reserve(dialled, hub))
        yield hub, dialled, source


def is_settled(node: Overlay, other: Overlay) -> bool:
    upgrade = node._traversal._puncher._upgrades.get(other.peer_id)
    return upgrade is not None and upgrade.settled.is_set()


async def assert_still_relayed(hub: Overlay, dialled: Overlay, dialler: Overlay) -> None:
    """The exchange is over at the dialled side, has left nothing, and the relayed connection works."""
    await until(lambda: is_settled(dialled, dialler))
    assert not dialled.is_direct(dialler.peer_id)
    async with await dialler.open_stream(dialled.peer_id, ECHO) as stream:
        assert stream.is_relayed
        assert await exchange(stream, 1_000) == 1_000
    await until(lambda: dialled.statistics().streams == 1)  # the circuit's own
    assert relaying(hub).circuits == 1
    await dialler.disconnect(dialled.peer_id)
    await until(lambda: relaying(hub).circuits == 0 and dialled.statistics().streams == 0)


@pytest.mark.usefixtures("loopback_is_public")
async def test_a_relayed_connection_becomes_direct() -> None:
    async with relayed() as (_, dialled, dialler):
        assert dialler.is_direct(dialled.peer_id)
        await until(lambda: dialled.is_direct(dialler.peer_id))
        async with await dialler.open_stream(dialled.peer_id, ECHO) as stream:
            assert not stream.is_relayed
            assert await exchange(stream, 1_000) == 1_000
        for node, other in ((dialled, dialler), (dialler, dialled)):
            await until(lambda node=node, other=other: is_settled(node, other))
            assert not node.statistics().violations


@pytest.mark.usefixtures("loopback_is_public", "impatient")
async def test_a_hole_that_was_not_punched_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "_DIAL_SECONDS", 0.3)
    monkeypatch.setattr(punch, "_AGAIN_SECONDS", 0.5)
    async with corners(listen=LOOPBACK) as (hub, dialled, dialler):
        for node in (dialled, dialler):
            seen_at(node, "/ip4/127.0.0.1/tcp/1")  # nobody is there
        await dialler.connect(dialled.peer_id, await reserve(dialled, hub))
        upgrade = dialler._traversal._puncher._upgrades[dialled.peer_id]
        await until(lambda: upgrade.attempts < 0)  # those that were agreed, and one more
        assert not dialler.is_direct(dialled.peer_id)
        for node in (dialled, dialler):
            seen_at(node)
        await until(lambda: dialled.is_direct(dialler.peer_id) and dialler.is_direct(dialled.peer_id))


@pytest.mark.parametrize(
    "answer",
    [
        offer(),
        offer(b"", b"\xff" * 60, b"\x04\x01"),
        offer("/ip4/10.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/dns4/localhost/tcp/1", "/ip4/127.0.0.1/udp/1"),
        HolePunch(type=HolePunch.SYNC),
        HolePunch(type=HolePunch.CONNECT, ObsAddrs=[b"\x04\x7f\x00\x00\x01\x06\x00\x01"] * 1_000),
    ],
    ids=["nothing", "garbage", "private", "another type", "a thousand"],
)
@pytest.mark.usefixtures("loopback_is_public")
async def test_a_dialler_that_answers_nonsense_stays_relayed(answer: HolePunch) -> None:
    async def dialler(stream: OverlayStream) -> None:
        await read_message(stream, HolePunch)
        await write_message(stream, answer)
        await stream.receive_some()

    async with relayed(dialler=dialler) as net:
        await assert_still_relayed(*net)


@pytest.mark.usefixtures("loopback_is_public")
async def test_a_dialler_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "_MESSAGE_SECONDS", 0.3)

    async def dialler(stream: OverlayStream) -> None:
        while await stream.receive_some():
            pass

    async with relayed(dialler=dialler) as net:
        await assert_still_relayed(*net)


@pytest.mark.usefixtures("loopback_is_public")
async def test_few_of_the_addresses_that_a_stranger_names_are_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "_DIAL_SECONDS", 0.5)
    exchanges = 0
    async with counted("0.0.0.0") as (listening, dials):
        port = listening.split("/")[-1]
        named = offer(*(f"/ip4/127.0.{host}.1/tcp/{port}" for host in range(1, 200)))

        async def dialler(stream: OverlayStream) -> None:
            nonlocal exchanges
            exchanges += 1
            await read_message(stream, HolePunch)
            await write_message(stream, named)
            await stream.receive_some()

        async with relayed(dialler=dialler) as net:
            await assert_still_relayed(*net)
        assert exchanges == 3
        assert 0 < len(dials) <= 3 * 4


@pytest.mark.usefixtures("loopback_is_public")
async def test_private_addresses_are_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "_DIAL_SECONDS", 0.5)
    async with counted("127.128.0.1") as (private, dials), counted("127.0.0.9") as (public, others):

        async def dialler(stream: OverlayStream) -> None:
            await read_message(stream, HolePunch)
            await write_message(stream, offer(private, public))
            await stream.receive_some()

        async with relayed(dialler=dialler) as net:
            await assert_still_relayed(*net)
        assert (len(dials), len(others)) == (0, 3)


@asynccontextmanager
async def awaited() -> AsyncIterator[tuple[Overlay, Overlay]]:
    """(dialled, dialler): relayed, with a dialled side that begins nothing of its own."""

    async def nothing(_: str) -> None:
        pass

    async with corners(listen=LOOPBACK) as (hub, dialled, source):
        seen_at(source)
        dialled._traversal._puncher.begin = nothing  # type: ignore[method-assign]  # it is the hostile one here
        addresses = await reserve(dialled, hub)
        with trio.move_on_after(1):  # it would wait for 5 s for what is not begun
            await source.connect(dialled.peer_id, addresses)
        await until(lambda: source.is_connected(dialled.peer_id))
        yield dialled, source


async def begin(dialled: Overlay, dialler: Overlay, *messages: HolePunch | bytes) -> bytes:
    """The dialled side's messages, and what came of them after the first answer."""
    async with await dialled.open_stream(dialler.peer_id, DCUTR) as stream:
        with suppress(NetworkError):  # the dialler may have ended the stream by the second one
            for each in messages:
                if isinstance(each, bytes):
                    await stream.send_all(each)
                else:
                    await write_message(stream, each)
        answer = bytearray()
        while part := await stream.receive_some():
            answer += part
        return bytes(answer)


@pytest.mark.parametrize(
    ("messages", "offences"),
    [
        ([offer()], 0),
        ([b"\x04\xff\xff\xff\xff"], 1),
        ([b"\xff\xff\xff\xff"], 1),
        ([HolePunch(type=HolePunch.SYNC)], 1),
        ([offer("/ip4/127.0.0.1/tcp/1"), offer("/ip4/127.0.0.1/tcp/1")], 1),
        ([offer("/ip4/127.0.0.1/tcp/1")], 0),
    ],
    ids=["nothing", "garbage", "too large", "SYNC at once", "CONNECT twice", "never SYNC"],
)
@pytest.mark.usefixtures("loopback_is_public")
async def test_a_dialled_side_that_breaks_the_exchange(
    messages: list[HolePunch | bytes], offences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "_MESSAGE_SECONDS", 0.5)
    async with awaited() as (dialled, dialler):
        await begin(dialled, dialler, *messages)
        await until(lambda: dialler.statistics().violations.get(dialled.peer_id, 0) == offences)
        await until(lambda: is_settled(dialler, dialled))
        assert dialler.is_connected(dialled.peer_id)
        assert not dialler.is_direct(dialled.peer_id)


@pytest.mark.usefixtures("loopback_is_public", "impatient")
async def test_nobody_is_dialled_more_often_than_was_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "_DIAL_SECONDS", 0.3)
    async with awaited() as (dialled, dialler), AsyncExitStack() as stack:
        # One victim for each, as a port that has just been closed may not be dialled again at once.
        victims = [await stack.enter_async_context(counted(f"127.0.0.{host}")) for host in range(9, 15)]
        attempts = [(offer(victim), HolePunch(type=HolePunch.SYNC)) for victim, _ in victims]
        await begin(dialled, dialler, *attempts[0], *attempts[1])  # on one stream, as the specification has it
        for attempt in attempts[2:]:
            await begin(dialled, dialler, *attempt)
        assert [len(dials) for _, dials in victims] == [1, 1, 1, 0, 0, 0]


async def test_the_roles_hold_whoever_dials_first() -> None:
    async with corners(listen=LOOPBACK) as (_, responder, client):
        here, there = client.own_addresses[0], responder.own_addresses[0]
        with client._traversal._dials.expecting(responder.peer_id, [there]):
            await responder._traversal._dials.connect_as_responder(client.peer_id, here)
        assert responder.is_direct(client.peer_id)
        assert client.is_direct(responder.peer_id)
        assert not client._swarm.punching


async def test_who_is_expected_cannot_be_somebody_else() -> None:
    async with corners(listen=LOOPBACK) as (_, responder, client):
        here, there = client.own_addresses[0], responder.own_addresses[0]
        somebody = client._traversal._dials.expecting(Identity.generate().peer_id, [there])
        with somebody, pytest.raises(Exception):  # noqa: B017, PT011 - libp2p's own
            await responder._traversal._dials.connect_as_responder(client.peer_id, here)
        assert not client.is_connected(responder.peer_id)


@pytest.mark.usefixtures("loopback_is_public", "impatient")
async def test_who_came_to_us_cannot_make_us_dial() -> None:
    async with awaited() as (dialled, dialler), counted("127.0.0.9") as (victim, dials):
        seen_at(dialled)
        assert await begin(dialler, dialled, offer(victim), HolePunch(type=HolePunch.SYNC)) == b""
        assert not dials


async def test_a_direct_connection_needs_no_hole() -> None:
    async with corners(listen=LOOPBACK) as (_, one, other):
        await one.connect(other.peer_id, other.addrs)
        assert await begin(one, other, offer("/ip4/25.1.0.1/tcp/1")) == b""
        with pytest.raises(NetworkError):
            await one.open_stream(other.peer_id, "/test/unknown")
        assert other.is_direct(one.peer_id)
