"""Messages: every one comes through as it was sent, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import ProtocolError
from azu.models.manifest import PIECE_BYTES
from azu.wire import messages
from azu.wire.document import encode_cbor
from azu.wire.frames import MAX_HEADER_BYTES, Frame, FrameReader
from azu.wire.messages import (
    CONTROL,
    JOB,
    LAYERS,
    MAX_PACKED,
    MAX_PART,
    MAX_RANGE_BYTES,
    MAX_TOKENS,
    PACK,
    RING,
    Accepted,
    Amend,
    Assign,
    Bequeath,
    BlobRange,
    Chunk,
    Codec,
    Credit,
    End,
    Failed,
    Forget,
    GetBlob,
    GetManifest,
    GetStatus,
    HaveBlobs,
    Hello,
    Inheritance,
    Inherited,
    Kept,
    Leaving,
    ManifestReply,
    Message,
    Moved,
    Next,
    Nexts,
    Open,
    Paused,
    Ping,
    Prompt,
    Ready,
    ReceiptReply,
    Refused,
    Resume,
    Rows,
    Status,
    Token,
    Waiting,
    Welcome,
    WhichBlobs,
    encode_message,
)
from azu.wire.tensors import TensorHeader

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
TENSOR = TensorHeader(dtype="float16", shape=(3, 8))
REFUSED = Refused(code="no_capacity", message="nothing is free", remedy="Try later")

EXAMPLES: dict[Codec, tuple[Message, ...]] = {
    CONTROL: (GetStatus(), Status(), Assign(), Accepted(), REFUSED),
    LAYERS: (
        GetManifest(digest="0" * 64),
        ManifestReply(),
        WhichBlobs(),
        HaveBlobs(),
        GetBlob(digest="f" * 64, offset=2**44, length=MAX_RANGE_BYTES),
        BlobRange(),
        REFUSED,
    ),
    JOB: (
        Open(),
        Prompt(),
        Ping(),
        Amend(known=7),
        Resume(epoch=1, position=0, send_from=9, known=7),
        End(tokens=7),
        Forget(),
        Ready(),
        Paused(epoch=2**31, position=MAX_TOKENS, can_replay=False),
        Waiting(),
        Leaving(),
        Bequeath(positions=1),
        Inherited(positions=MAX_TOKENS),
        Token(index=MAX_TOKENS, token=2**31 - 1, finish="stop"),
        Failed(code="stage_lost", message="it went away", peer_id=PEER),
        ReceiptReply(),
        REFUSED,
    ),
    RING: (
        Hello(job_id=b"j" * 16, epoch=2**31, stage=1_000, part=MAX_PART),
        Welcome(),
        Moved(part=1),
        Chunk(position=7, tensor=TENSOR, sample=True),
        Inheritance(positions=1),
        Kept(layer=1_000, position=7, rows=2),
        Next(index=0, token=5),
        Credit(frames=1_024),
        REFUSED,
    ),
    PACK: (
        Rows(jobs=((b"j" * 16, 2**31, MAX_TOKENS),) * MAX_PACKED, tensor=TENSOR),
        Nexts(jobs=((b"j" * 16, 0, MAX_TOKENS, 2**31 - 1),) * MAX_PACKED),
    ),
}
ALL = [(codec, message) for codec, group in EXAMPLES.items() for message in group]
IDS = [f"{codec.name}-{message.t}" for codec, message in ALL]  # type: ignore[attr-defined]
WITH_BODY = (
    Status, Assign, ManifestReply, WhichBlobs, HaveBlobs, BlobRange, Open, Prompt, Amend, Paused, Resume, ReceiptReply,
    Chunk, Bequeath, Kept, Rows,
)  # fmt: skip


def frame_of(message: Message, body: bytes = b"") -> Frame:
    reader = FrameReader(max_body=len(body))
    for buffer in encode_message(message, body):
        reader.receive_data(buffer)
    frame = reader.next_frame()
    assert frame is not None
    return frame


def header(message: Message, /, **changes: Any) -> Frame:
    return Frame(encode_cbor(message.model_dump() | changes), bytearray())


@pytest.mark.parametrize(("codec", "message"), ALL, ids=IDS)
def test_round_trip(codec: Codec, message: Message) -> None:
    body = b"body" if isinstance(message, WITH_BODY) else b""
    frame = frame_of(message, body)
    assert codec.decode(frame) == message
    assert type(codec.decode(frame)) is type(message)
    assert frame.body == body


def test_the_examples_are_all_messages_that_there_are() -> None:
    declared = {name for name in messages.__all__ if isinstance(getattr(messages, name), type)} - {"Codec", "Message"}
    assert {type(message).__name__ for _, message in ALL} == declared


@pytest.mark.parametrize(("codec", "message"), ALL, ids=IDS)
def test_a_message_of_another_protocol_is_refused(codec: Codec, message: Message) -> None:
    for other, group in EXAMPLES.items():
        if type(message) in {type(each) for each in group}:
            continue
        with pytest.raises(ProtocolError) as raised:
            other.decode(frame_of(message))
        assert raised.value.code == "bad_message"
    assert codec.decode(frame_of(message)) == message


@pytest.mark.parametrize(("codec", "message"), ALL, ids=IDS)
def test_unknown_fields_are_refused(codec: Codec, message: Message) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(header(message, extra=1))


@pytest.mark.parametrize(("codec", "message"), ALL, ids=IDS)
def test_a_body_over_the_messages_limit_is_refused(codec: Codec, message: Message) -> None:
    limit = type(message).max_body
    assert (limit > 0) == isinstance(message, WITH_BODY)
    assert limit <= codec.max_body
    # The body is checked by its length alone: one that claims to be huge need not exist for this.
    frame = Frame(encode_cbor(message.model_dump()), _Sized(limit + 1))
    with pytest.raises(ProtocolError) as raised:
        codec.decode(frame)
    assert raised.value.code == "too_large"
    codec.decode(Frame(frame.header, _Sized(limit)))


class _Sized(bytearray):
    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def __len__(self) -> int:
        return self._length


REPLACEMENTS = ["1", b"1", 1.0, True, None, [], {}, -1, 2**63, [1], "x" * 3_000]


@pytest.mark.parametrize(("codec", "message"), ALL, ids=IDS)
def test_nothing_is_coerced(codec: Codec, message: Message) -> None:
    """A value of another type is refused; one of the same type is either refused or kept as it is."""
    for name, value in message.model_dump().items():
        for replacement in REPLACEMENTS:
            try:
                decoded = codec.decode(header(message, **{name: replacement}))
            except ProtocolError:
                continue
            assert type(replacement) is type(value), (name, replacement)
            assert getattr(decoded, name) == replacement


@pytest.mark.parametrize(
    ("codec", "values"),
    [
        (JOB, {"t": "token", "index": MAX_TOKENS + 1, "token": 1, "finish": ""}),
        (JOB, {"t": "token", "index": 1, "token": 2**31, "finish": ""}),
        (JOB, {"t": "token", "index": 1, "token": 1, "finish": "error"}),
        (JOB, {"t": "token"}),
        (JOB, {"t": "failed", "code": "Bad Code", "message": "", "peer_id": PEER}),
        (JOB, {"t": "failed", "code": "code", "message": "", "peer_id": "nobody"}),
        (JOB, {"t": "nothing"}),
        (JOB, {"t": ["ping"]}),
        (JOB, {"t": {"t": "ping"}}),
        (JOB, {"t": None}),
        (JOB, {}),
        (JOB, {"index": 1}),
        (JOB, "ping"),
        (JOB, [1, 2]),
        (JOB, None),
        (RING, {"t": "hello", "job_id": b"short", "epoch": 0, "stage": 0}),
        (RING, {"t": "hello", "job_id": "j" * 16, "epoch": 0, "stage": 0}),
        (RING, {"t": "credit", "frames": 0}),
        (RING, {"t": "credit", "frames": 1_025}),
        (RING, {"t": "chunk", "position": 0, "sample": 1, "tensor": {"dtype": "float32", "shape": [1, 2]}}),
        (RING, {"t": "chunk", "position": 0, "sample": True, "tensor": {"dtype": "float64", "shape": [1, 2]}}),
        (LAYERS, {"t": "get-blob", "digest": "f" * 64, "offset": 2**44 + 1}),
        (LAYERS, {"t": "get-manifest", "digest": "../../etc/passwd"}),
        (CONTROL, {"t": "refused", "code": "x", "message": "m" * 2_001, "remedy": ""}),
    ],
)
def test_values_out_of_bounds_are_refused(codec: Codec, values: Any) -> None:
    with pytest.raises(ProtocolError) as raised:
        codec.decode(Frame(encode_cbor(values), bytearray()))
    assert raised.value.code == "bad_message"


@given(st.sampled_from(list(EXAMPLES)), st.binary(max_size=300))
def test_random_headers_raise_nothing_but_protocol_errors(codec: Codec, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(Frame(data, bytearray()))


@given(st.sampled_from(ALL), st.data())
def test_mutated_streams_raise_nothing_but_protocol_errors(pair: tuple[Codec, Message], data: st.DataObject) -> None:
    codec, message = pair
    encoded = bytearray(b"".join(encode_message(message, b"body" if isinstance(message, WITH_BODY) else b"")))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    reader = FrameReader(max_body=codec.max_body)
    reader.receive_data(encoded)
    try:
        while (frame := reader.next_frame()) is not None:
            assert isinstance(codec.decode(frame), Message)
    except ProtocolError:
        pass


def test_the_longest_refusal_fits_into_a_header() -> None:
    longest = Refused(code="c" * 64, message="\U0001f600" * 2_000, remedy="\U0001f600" * 2_000)
    frame = frame_of(longest)
    assert len(frame.header) <= MAX_HEADER_BYTES
    assert CONTROL.decode(frame) == longest


def test_a_range_is_a_piece() -> None:
    assert LAYERS.max_body == BlobRange.max_body == MAX_RANGE_BYTES == PIECE_BYTES
