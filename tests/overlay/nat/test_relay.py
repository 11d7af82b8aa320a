"""Circuits through a relay: what it gives, what it refuses, and what hostile ends and hostile relays can do."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status as Codes

from azu.errors import NetworkError
from azu.overlay import Overlay, OverlayStream, RelayLimits
from azu.overlay.addresses import line_of, parse_circuit, parse_peer_id, parse_peer_multiaddr
from azu.overlay.nat import circuits, relay
from azu.overlay.nat.messages import decode_addresses, read_message, write_message
from azu.overlay.nat.relay import HOP, STOP
from tests.overlay.nat.corners import ECHO, accept_raw, ask, corners, exchange, relaying, reserve, status, until

MIB = 1 << 20


async def test_a_reservation_is_answered_as_other_implementations_expect() -> None:
    async with corners(RelayLimits(reservation=600, data=7_000, duration=70), others=1) as (hub, node):
        before = time.time()
        answer, _ = await ask(node, hub)
        assert (answer.type, answer.status) == (HopMessage.STATUS, Codes.OK)
        assert 599 <= answer.reservation.expire - before <= 660
        assert (answer.limit.data, answer.limit.duration) == (7_000, 70)
        assert decode_addresses(answer.reservation.addrs) == list(hub.own_addresses)
        told = [parse_peer_multiaddr(each) for each in hub.addrs]
        assert len(told) == len(answer.reservation.addrs)
        assert all(raw.endswith(parse_peer_id(hub.peer_id).to_bytes()) for raw in answer.reservation.addrs)


async def test_reservations_are_limited_and_end_with_their_connection() -> None:
    async with corners(RelayLimits(reservations=2), others=3) as (hub, one, other, third):
        for node in (one, other, one):  # whoever has a place keeps it
            assert await status(node, hub) == Codes.OK
        assert await status(third, hub) == Codes.RESERVATION_REFUSED
        assert (relaying(hub).reservations, relaying(hub).refused) == (2, 1)
        await one.disconnect(hub.peer_id)
        await until(lambda: relaying(hub).reservations == 1)
        assert await status(third, hub) == Codes.OK
        await one.connect(hub.peer_id, hub.addrs)
        assert await status(other, hub, one) == Codes.NO_RESERVATION


async def test_reservations_of_one_address_are_limited() -> None:
    async with corners(RelayLimits(per_address=1), others=2) as (hub, one, other):
        assert await status(one, hub) == Codes.OK
        with pytest.raises(NetworkError, match="reservation refused") as caught:
            await reserve(other, hub)
        assert caught.value.code == "relay_refused"


def test_what_counts_as_one_address() -> None:
    assert line_of("203.0.113.7") != line_of("203.0.113.8")
    assert line_of("2001:db8:0:100::1") == line_of("2001:db8:0:1ff:1::2") != line_of("2001:db8:0:200::1")
    assert line_of("fe80::1%eth0") == "fe80::/56"


async def test_a_reservation_expires() -> None:
    async with corners(RelayLimits(reservation=0)) as (hub, target, source):
        assert await status(target, hub) == Codes.OK
        assert await status(source, hub, target) == Codes.NO_RESERVATION
        assert relaying(hub).reservations == 0


@pytest.mark.parametrize("limits", [RelayLimits(per_peer=1), RelayLimits(circuits=1)])
async def test_circuits_are_limited(limits: RelayLimits) -> None:
    async with corners(limits, others=3) as (hub, target, source, third):
        target.handle(STOP, accept_raw)
        await reserve(target, hub)
        answer, circuit = await ask(source, hub, target)
        assert answer.status == Codes.OK
        for node in (source, third):
            assert await status(node, hub, target) == Codes.RESOURCE_LIMIT_EXCEEDED
        assert await exchange(circuit, 1_000) == 1_000
        await circuit.aclose()
        await until(lambda: relaying(hub).circuits == 0)
        assert await status(third, hub, target) == Codes.OK


async def test_a_circuit_ends_at_its_limit_of_bytes_and_others_live_on() -> None:
    async with corners(RelayLimits(data=100_000), others=3) as (hub, target, source, third):
        target.handle(STOP, accept_raw)
        await reserve(target, hub)
        (_, long), (_, short) = await ask(source, hub, target), await ask(third, hub, target)
        assert await exchange(long, 100_000) == 100_000, "the limit is for each direction"
        assert relaying(hub).carried == 200_000
        await long.send_all(b"1")
        assert await long.receive_some(1) == b""
        await until(lambda: relaying(hub).circuits == 1)
        assert await exchange(short, 5_000) == 5_000
        assert relaying(hub).carried == 210_000


async def test_a_circuit_ends_after_its_time() -> None:
    async with corners(RelayLimits(duration=1)) as (hub, target, source):
        target.handle(STOP, accept_raw)
        await reserve(target, hub)
        _, circuit = await ask(source, hub, target)
        assert await circuit.receive_some(1) == b""
        await until(lambda: relaying(hub).circuits == 0)
        assert hub.is_direct(source.peer_id)
        assert await status(source, hub, target) == Codes.OK


async def test_a_relayed_connection_is_like_any_other() -> None:
    async with corners() as (hub, target, source):
        addresses = await reserve(target, hub)
        assert parse_circuit(addresses[0]).peer_id == hub.peer_id
        async with await source.open_stream(target.peer_id, ECHO, addrs=addresses) as stream:
            assert stream.is_relayed
            began = time.perf_counter()
            assert await exchange(stream, 8 * MIB) == 8 * MIB
            print(f"\n8 MiB through a circuit, and back: {16 / (time.perf_counter() - began):.0f} MiB/s")
        assert relaying(hub).carried > 16 * MIB
        assert await source.ping(target.peer_id) > 0
        assert source.remote_address(target.peer_id) == ""
        await source.disconnect(target.peer_id)
        await until(lambda: relaying(hub).circuits == 0 and not target.is_connected(source.peer_id))


async def test_nobody_is_relayed_to_a_relay() -> None:
    async with corners(relay=RelayLimits()) as (hub, target, source):
        await source.connect(target.peer_id, await reserve(target, hub))
        assert await status(source, target) == Codes.PERMISSION_DENIED
        with pytest.raises(NetworkError, match="itself reached through a relay"):
            await source._traversal._circuits.reserve(target.peer_id)


async def test_a_peer_is_not_its_own_relay() -> None:
    async with corners() as (hub, target, source):
        [address, *_] = await reserve(target, hub)
        with pytest.raises(NetworkError):
            await source.connect(target.peer_id, [address.replace(hub.peer_id, target.peer_id)])


OFFENCES = {
    "garbage": b"\x04\xff\xff\xff\xff",
    "an answer": b"\x05\x08\x02\x28\xc8\x01",
    "nobody": b"\x02\x08\x01",
    "no peer id": b"\x08\x08\x01\x12\x04\x0a\x02ab",
    "too large": b"\xff\xff\x01" + bytes(100),
    "a long length": b"\xff\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("offence", OFFENCES)
@pytest.mark.parametrize("protocol", [HOP, STOP])
async def test_what_nobody_honest_sends_ends_the_stream_only(offence: str, protocol: str) -> None:
    async with corners(others=1) as (hub, node):
        stream = await node.open_stream(hub.peer_id, protocol)
        await stream.send_all(OFFENCES[offence])
        answer = await stream.receive_some()
        assert not answer.endswith(bytes([Codes.OK]))
        await until(lambda: hub.statistics().violations.get(node.peer_id, 0) == (answer == b""))
        assert await status(node, hub) == Codes.OK


async def test_a_stream_that_ends_early_is_no_offence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_MESSAGE_SECONDS", 0.2)
    async with corners(others=1) as (hub, node):
        for data in (b"", b"\x02", b"\x02\x08"):
            stream = await node.open_stream(hub.peer_id, HOP)
            await stream.send_all(data)
            await stream.send_eof()
            assert await stream.receive_some() == b""
        silent = await node.open_stream(hub.peer_id, HOP)
        assert await silent.receive_some() == b"", "whoever says nothing is not waited for"
        assert not hub.statistics().violations


async def test_only_relays_that_we_chose_pass_connections_on() -> None:
    async with corners() as (hub, node, _), await hub.open_stream(node.peer_id, STOP) as stream:
        await write_message(stream, _offer(hub))
        assert (await read_message(stream, StopMessage)).status == Codes.PERMISSION_DENIED


def _offer(source: Overlay) -> StopMessage:
    offer = StopMessage(type=StopMessage.CONNECT)
    offer.peer.id = parse_peer_id(source.peer_id).to_bytes()
    return offer


def lying(hub: Overlay, target: Overlay, named: Overlay) -> Callable[[OverlayStream], Awaitable[None]]:
    """A handler of HOP that names another peer than the one that comes."""

    async def handle(stream: OverlayStream) -> None:
        await read_message(stream, HopMessage)
        async with await hub.open_stream(target.peer_id, STOP) as stop:
            await write_message(stop, _offer(named))
            await read_message(stop, StopMessage)
            await write_message(stream, HopMessage(type=HopMessage.STATUS, status=Codes.OK))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, stream, stop)
                nursery.start_soon(_pump, stop, stream)

    return handle


async def _pump(source: OverlayStream, sink: OverlayStream) -> None:
    while data := await source.receive_some():
        await sink.send_all(data)
    await sink.aclose()


async def test_a_relay_cannot_pass_off_one_peer_as_another() -> None:
    async with corners() as (hub, target, source):
        addresses = await reserve(target, hub)
        hub.handle(HOP, lying(hub, target, named=hub))
        with pytest.raises(NetworkError):
            await source.open_stream(target.peer_id, ECHO, addrs=addresses)
        await until(lambda: target.statistics().violations == {hub.peer_id: 1})
        await until(lambda: not target.is_connected(source.peer_id))


@pytest.mark.parametrize("answer", [None, Codes.NO_RESERVATION, 4_242, Codes.OK])
async def test_a_relay_that_fails_us_is_reported(answer: int | None) -> None:
    async def handle(stream: OverlayStream) -> None:
        await read_message(stream, HopMessage)
        if answer is not None:
            await write_message(stream, HopMessage(type=HopMessage.STATUS, status=answer))  # type: ignore[arg-type]

    async with corners() as (hub, target, source):
        addresses = await reserve(target, hub)
        hub.handle(HOP, handle)
        with pytest.raises(NetworkError):
            await source.connect(target.peer_id, addresses)
        assert not source.is_connected(target.peer_id)
        with pytest.raises(NetworkError):  # and one that is without an address is of no use either
            await reserve(source, hub)


@pytest.mark.parametrize("stage", ["answer", "handshake"])
async def test_a_dial_that_is_given_up_leaves_no_circuit(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_MESSAGE_SECONDS", 0.5)
    reached = trio.Event()

    async def silent(stream: OverlayStream) -> None:
        await read_message(stream, StopMessage)
        if stage == "handshake":
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Codes.OK))
        reached.set()
        while await stream.receive_some():
            pass

    async with corners() as (hub, target, source):
        addresses = await reserve(target, hub)
        target.handle(STOP, silent)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.connect, target.peer_id, addresses)
            await reached.wait()
            assert relaying(hub).circuits == 1
            nursery.cancel_scope.cancel()
        await until(lambda: relaying(hub).circuits == 0)
        assert not source.is_connected(target.peer_id)
        await until(lambda: hub.statistics().streams == 0)
        assert source.statistics().streams == target.statistics().streams == 0


async def test_new_streams_take_a_fresh_circuit_when_half_of_one_is_used_up() -> None:
    async with corners(RelayLimits(data=MIB)) as (hub, target, source):
        addresses = await reserve(target, hub)
        async with await source.open_stream(target.peer_id, ECHO, addrs=addresses) as old:
            assert await exchange(old, 600_000) == 600_000
            async with await source.open_stream(target.peer_id, ECHO, addrs=addresses) as new:
                assert relaying(hub).circuits == 2
                assert await exchange(new, 600_000) == 600_000
            assert await exchange(old, 100_000) == 100_000, "what runs goes on"


async def test_streams_move_to_a_direct_connection_and_the_idle_circuit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuits, "_IDLE_SECONDS", 0.05)
    async with corners(listen=("/ip4/127.0.0.1/tcp/0",)) as (hub, target, source):
        addresses = await reserve(target, hub)
        async with await source.open_stream(target.peer_id, ECHO, addrs=addresses) as old:
            assert old.is_relayed
            with trio.move_on_after(0.05) as waiting:
                await source.until_direct(target.peer_id)
            assert waiting.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.until_direct, target.peer_id)
                nursery.start_soon(target.until_direct, source.peer_id)
                await source._traversal._dials.connect(target.peer_id, target.own_addresses[0])
            async with await source.open_stream(target.peer_id, ECHO) as new:
                assert not new.is_relayed
                await trio.sleep(0.3)  # several times what an idle circuit is given
                assert await exchange(new, 1_000) == await exchange(old, 1_000) == 1_000
        await until(lambda: relaying(hub).circuits == 0)
        assert source.is_direct(target.peer_id)
        assert await source.ping(target.peer_id) > 0
