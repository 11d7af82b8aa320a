"""Channels: two real ones over a pair of memory streams."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MemoryReceiveStream, MemorySendStream, memory_stream_pair

from azu.channel import Channel, RefusedError, refusal_of
from azu.errors import InputError, InternalError, ModelError, NetworkError, ProtocolError
from azu.wire.frames import Buffer
from azu.wire.messages import (
    CONTROL,
    JOB,
    LAYERS,
    Accepted,
    BlobRange,
    End,
    GetManifest,
    GetStatus,
    Message,
    Open,
    Ping,
    Prompt,
    Refused,
    Status,
    Token,
    encode_message,
)

MemoryStream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]


class StreamTwin:
    """A memory stream as azu.overlay.OverlayStream is one: the end is b"", and lost peers are NetworkErrors."""

    is_relayed = False

    def __init__(self, stream: MemoryStream, peer_id: str) -> None:
        self._stream = stream
        self._peer_id = peer_id

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def receive_buffers(self, max_bytes: int) -> list[Buffer]:
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError:
            return []
        return [data] if data else []

    async def send_all(self, *buffers: Buffer) -> None:
        try:
            for buffer in buffers:
                await self._stream.send_all(buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise NetworkError(f"{self._peer_id} is gone") from error

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def reset(self) -> None:
        await self._stream.aclose()


def streams() -> tuple[StreamTwin, StreamTwin]:
    left, right = memory_stream_pair()
    return StreamTwin(left, "right"), StreamTwin(right, "left")


def job_channels() -> tuple[Channel, Channel]:
    left, right = streams()
    return Channel(left, JOB), Channel(right, JOB)


async def test_messages_arrive_in_order_with_their_bodies() -> None:
    left, right = job_channels()
    sent: list[tuple[Message, bytes]] = [
        (Open(), b"ticket"),
        (Prompt(), bytes(300_000)),
        (Token(index=0, token=5), b""),
        (End(), b""),
    ]
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for message, body in sent:
                await left.send(message, body)

        nursery.start_soon(send)
        with trio.fail_after(60):
            for message, body in sent:
                assert await right.receive() == (message, bytearray(body))
    assert (left.peer_id, right.peer_id) == ("right", "left")


async def test_both_directions_at_once() -> None:
    left, right = job_channels()
    await left.send(Ping())
    await right.send(End())
    with trio.fail_after(60):
        assert await left.expect(End) == (End(), bytearray())
        assert await right.expect(Ping) == (Ping(), bytearray())


async def test_the_end_between_frames_is_none() -> None:
    left, right = job_channels()
    await left.send(Ping())
    await left.stream.send_eof()
    assert await right.receive() == (Ping(), bytearray())
    assert await right.receive() is None
    assert await right.receive() is None


async def test_the_end_inside_a_frame_is_a_fault_of_the_network() -> None:
    whole = b"".join(encode_message(Open(), b"ticket"))
    for cut in range(1, len(whole)):
        left, right = streams()
        await left.send_all(whole[:cut])
        await left.send_eof()
        with pytest.raises(NetworkError) as raised:
            await Channel(right, JOB).receive()
        assert raised.value.code == "stream_broken"


async def test_expect_says_what_came_instead() -> None:
    left, right = job_channels()
    await left.send(Ping())
    with pytest.raises(ProtocolError) as raised:
        await right.expect(Open)
    assert raised.value.code == "unexpected_message"
    await left.stream.send_eof()
    with pytest.raises(NetworkError) as closed:
        await right.expect(Open)
    assert closed.value.code == "stream_closed"


async def test_a_refusal_keeps_the_peers_words() -> None:
    left, right = job_channels()
    await left.send(Refused(code="no_capacity", message="nothing is free", remedy="Try later"))
    with pytest.raises(RefusedError) as raised:
        await right.expect(Open)
    error = raised.value
    assert isinstance(error, NetworkError)
    assert (error.code, error.remedy, error.peer_id) == ("no_capacity", "Try later", "left")
    assert "nothing is free" in error.message


@given(st.binary(min_size=1, max_size=200))
def test_garbage_ends_as_a_protocol_or_network_error(data: bytes) -> None:
    async def main() -> None:
        left, right = streams()
        await left.send_all(data)
        await left.send_eof()
        with pytest.raises((ProtocolError, NetworkError)):
            await Channel(right, CONTROL).receive()

    trio.run(main)


async def test_a_message_of_another_protocol_is_refused() -> None:
    left, right = streams()
    await Channel(left, LAYERS).send(GetManifest(digest="0" * 64))
    with pytest.raises(ProtocolError):
        await Channel(right, JOB).receive()


async def test_a_body_over_the_channels_limit_is_refused_before_it_comes() -> None:
    left, right = streams()
    await left.send_all(b"".join(encode_message(Status(), b"x" * 101))[:8])  # the two lengths alone
    with pytest.raises(ProtocolError) as raised, trio.fail_after(60):
        await Channel(right, CONTROL, max_body=100).receive()
    assert raised.value.code == "too_large"


async def test_the_limit_may_be_lowered_and_raised() -> None:
    left, right = streams()
    sender, receiver = Channel(left, LAYERS), Channel(right, LAYERS, max_body=0)
    await sender.send(BlobRange(), b"123")
    receiver.limit_body(3)
    assert (await receiver.expect(BlobRange))[1] == b"123"
    receiver.limit_body(2)
    await sender.send(BlobRange(), b"456")
    with pytest.raises(ProtocolError):
        await receiver.receive()


async def test_a_body_on_a_message_without_one_is_refused() -> None:
    left, right = streams()
    await Channel(left, CONTROL).send(GetStatus(), b"x")
    with pytest.raises(ProtocolError):
        await Channel(right, CONTROL).receive()


async def test_a_cancelled_receive_loses_nothing() -> None:
    left, right = streams()
    receiver = Channel(right, JOB)
    whole = b"".join(encode_message(Open(), b"ticket")) + b"".join(encode_message(Ping()))
    for index in range(len(whole)):
        await left.send_all(whole[index : index + 1])
        with trio.move_on_after(0):
            assert await receiver.receive() is None
    # Each byte came in a receive of its own, most of them cancelled; now whatever is complete is there.
    with trio.fail_after(60):
        await left.send_all(b"".join(encode_message(End())))
        found = [await receiver.receive() for _ in range(3)]
    assert found == [(Open(), bytearray(b"ticket")), (Ping(), bytearray()), (End(), bytearray())]


async def test_sending_to_a_lost_peer_is_a_network_error() -> None:
    left, right = streams()
    await right.aclose()
    with pytest.raises(NetworkError):
        await Channel(left, CONTROL).send(Accepted())


def test_a_refusal_out_of_an_error() -> None:
    refusal = refusal_of(ModelError("it is broken" * 1_000, code="bad_model", remedy="r" * 3_000))
    assert (refusal.code, len(refusal.message), len(refusal.remedy)) == ("bad_model", 2_000, 2_000)
    assert refusal_of(InputError("no")).code == "bad_input"


def test_a_local_fault_stays_here() -> None:
    refusal = refusal_of(InternalError("/home/me/secret.key: disk full", code="storage", remedy="rm /home/me"))
    assert refusal == Refused(code="internal", message="internal error")


async def test_a_silent_peer_is_the_end_of_the_stream_where_one_asks_for_it() -> None:
    left, right = job_channels()
    assert await right.receive(0.01) is None
    await left.send(Ping())
    received = await right.receive(30)
    assert received is not None
    assert received[0] == Ping()
