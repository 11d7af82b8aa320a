"""Memory for pieces that is used again."""

from __future__ import annotations

from azu.distribution.buffers import Buffers
from azu.wire.frames import FrameReader, encode_frame
from azu.wire.messages import MAX_RANGE_BYTES


def test_whole_pieces_take_the_memory_of_those_before() -> None:
    buffers = Buffers()
    reader = FrameReader(max_body=MAX_RANGE_BYTES, allocate=buffers.take)
    first = bytes(range(256)) * (MAX_RANGE_BYTES // 256)
    bodies = []
    for data in (first, first[::-1], first[:1_000]):
        for part in encode_frame(b"header", data):
            reader.receive_data(part)
        frame = reader.next_frame()
        assert frame is not None
        assert frame.body == data
        bodies.append(frame.body)
        buffers.give_back(frame.body)
    assert bodies[0] is bodies[1]
    assert bodies[2] is not bodies[0]


def test_it_keeps_no_more_than_it_needs() -> None:
    buffers = Buffers()
    taken = [buffers.take(MAX_RANGE_BYTES) for _ in range(10)]
    for each in taken:
        buffers.give_back(each)
    buffers.give_back(buffers.take(10))
    again = [buffers.take(MAX_RANGE_BYTES) for _ in range(10)]
    assert sum(any(new is old for old in taken) for new in again) == 4
