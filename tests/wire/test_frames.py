"""Frames: any split of the bytes gives the same frames, and no length is believed before it is checked."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import ProtocolError
from azu.wire.frames import MAX_HEADER_BYTES, Frame, FrameReader, encode_frame

MAX_BODY = 200_000

Sent = list[tuple[bytes, bytes]]

bodies = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda seed, size: bytes([seed]) * size, st.integers(0, 255), st.sampled_from([65_535, 65_536, 65_537])),
)
frames = st.lists(st.tuples(st.binary(max_size=300), bodies), max_size=6)


def wire(sent: Sent) -> bytes:
    return b"".join(bytes(buffer) for header, body in sent for buffer in encode_frame(header, body))


def drain(reader: FrameReader) -> Sent:
    found: Sent = []
    while (frame := reader.next_frame()) is not None:
        found.append((frame.header, bytes(frame.body)))
    return found


@given(frames, st.data())
def test_any_split_decodes_to_the_same(sent: Sent, data: st.DataObject) -> None:
    encoded = wire(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=12)))
    reader = FrameReader(max_body=MAX_BODY)
    found: Sent = []
    for start, end in zip([0, *cuts], [*cuts, len(encoded)], strict=True):
        kind = data.draw(st.sampled_from([bytes, bytearray, memoryview]))
        reader.receive_data(kind(encoded[start:end]))
        # A shell may look for a frame after each piece, or only later.
        if data.draw(st.booleans()):
            found += drain(reader)
    found += drain(reader)
    assert found == sent
    assert reader.is_idle


def test_byte_by_byte() -> None:
    sent = [(b"h", b""), (b"", b"body"), (b"", b""), (b"head", b"x" * 70)]
    reader = FrameReader(max_body=100)
    found: Sent = []
    for byte in wire(sent):
        reader.receive_data(bytes([byte]))
        found += drain(reader)
    assert found == sent


@given(frames.filter(bool), st.data())
def test_idle_exactly_between_frames(sent: Sent, data: st.DataObject) -> None:
    encoded = wire(sent)
    cut = data.draw(st.integers(0, len(encoded)))
    ends = {len(wire(sent[:count])) for count in range(len(sent) + 1)}
    reader = FrameReader(max_body=MAX_BODY)
    reader.receive_data(encoded[:cut])
    drain(reader)
    assert reader.is_idle == (cut in ends)


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    reader = FrameReader(max_body=50)
    reader.receive_data(data)
    try:
        found = drain(reader)
    except ProtocolError:
        with pytest.raises(ProtocolError) as raised:  # and it stays broken
            reader.next_frame()
        assert raised.value.code == "too_large"
    else:
        assert all(len(body) <= 50 for _, body in found)


@pytest.mark.parametrize(
    ("header", "body"),
    [(2**32 - 1, 0), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1), (MAX_HEADER_BYTES + 1, 0), (0, 1_001)],
)
def test_a_length_over_its_limit_raises_before_anything_is_allocated(header: int, body: int) -> None:
    reader = FrameReader(max_body=1_000)
    tracemalloc.start()
    try:
        reader.receive_data(struct.pack(">II", header, body))
        with pytest.raises(ProtocolError) as raised:
            reader.next_frame()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert raised.value.code == "too_large"
    assert peak < 100_000


def test_lengths_at_their_limits_pass() -> None:
    reader = FrameReader(max_body=1_000)
    reader.receive_data(wire([(b"h" * MAX_HEADER_BYTES, b"b" * 1_000)]))
    assert drain(reader) == [(b"h" * MAX_HEADER_BYTES, b"b" * 1_000)]


def test_a_body_is_not_allocated_before_its_header_is_there() -> None:
    reader = FrameReader(max_body=64 << 20)
    tracemalloc.start()
    try:
        reader.receive_data(struct.pack(">II", 10, 64 << 20) + b"123456789")
        assert reader.next_frame() is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_the_limit_may_change_between_frames() -> None:
    reader = FrameReader(max_body=0)
    reader.receive_data(wire([(b"a", b""), (b"b", b"12345")]))
    assert reader.next_frame() == Frame(b"a", bytearray())
    with pytest.raises(ProtocolError):
        reader.next_frame()
    reader.max_body = 5
    assert reader.next_frame() == Frame(b"b", bytearray(b"12345"))


def test_a_large_body_is_written_from_where_it_lies() -> None:
    body = memoryview(bytearray(100_000))
    assert encode_frame(b"h", body)[1] is body
    assert len(encode_frame(b"h", memoryview(bytearray(100)))) == 1


def test_the_receiver_owns_the_body() -> None:
    reader = FrameReader(max_body=10)
    reader.receive_data(wire([(b"h", b"12345"), (b"h", b"67890")]))
    first = reader.next_frame()
    assert first is not None
    first.body[:] = b"xxxxx"
    first.body.extend(b"more")  # nothing of the reader's still looks into it
    assert drain(reader) == [(b"h", b"67890")]
