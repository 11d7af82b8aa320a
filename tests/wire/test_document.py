"""Documents out of hostile bytes: strict, bounded, and with one encoding for one value."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any, Literal

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from azu.errors import ProtocolError
from azu.wire.document import Digest, Document, PeerId, Tuple, decode_cbor, encode_cbor

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


class Part(Document):
    kind: Literal["a", "b"]
    share: Annotated[float, Field(ge=0.0, le=1.0)]


class Sample(Document):
    count: Annotated[int, Field(ge=0, le=10)]
    name: str
    raw: bytes
    flag: bool
    parts: Annotated[Tuple[Part], Field(max_length=3)] = ()
    numbers: Tuple[int] = ()


VALID: dict[str, Any] = {
    "count": 3,
    "name": "n",
    "raw": b"r",
    "flag": True,
    "parts": [{"kind": "a", "share": 0.5}],
    "numbers": [1, 2],
}

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def test_round_trip() -> None:
    document = Sample.model_validate(VALID)
    assert Sample.from_cbor(document.to_cbor()) == document
    assert Sample.from_cbor(memoryview(document.to_cbor())) == document
    assert Sample.from_cbor(bytearray(document.to_cbor())) == document


@given(st.permutations(list(VALID)))
def test_encoding_does_not_depend_on_the_order_of_fields(names: list[str]) -> None:
    expected = encode_cbor(VALID)
    assert encode_cbor({name: VALID[name] for name in names}) == expected
    assert Sample.model_validate({name: VALID[name] for name in names}).to_cbor() == expected


@given(plain)
def test_what_was_encoded_decodes(value: Any) -> None:
    try:
        assert decode_cbor(encode_cbor(value), limit=10**6) == value
    except ProtocolError:
        # Only what nests too deeply or needs a tag (integers past 64 bits) is refused.
        assert _depth(value) > 10 or _has_big_number(value)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(each) for each in inner), default=0)


def _has_big_number(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(_has_big_number(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**64) <= value < 2**64


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Sample.from_cbor(data)


@given(st.data())
def test_mutated_bytes_raise_nothing_but_protocol_errors(data: st.DataObject) -> None:
    encoded = bytearray(encode_cbor(VALID))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        document = Sample.from_cbor(encoded)
    except ProtocolError:
        return
    assert document.to_cbor() == bytes(encoded)


@pytest.mark.parametrize(
    "change",
    [
        {"count": "3"}, {"count": 3.0}, {"count": True}, {"count": 11}, {"count": -1}, {"count": None},
        {"name": b"n"}, {"name": 1}, {"raw": "r"}, {"flag": 1}, {"flag": "true"},
        {"parts": {}}, {"parts": "ab"}, {"parts": [{"kind": "a"}]}, {"parts": [{"kind": "c", "share": 0.5}]},
        {"parts": [{"kind": "a", "share": 0.5, "x": 1}]}, {"parts": [{"kind": "a", "share": "0.5"}]},
        {"parts": [{"kind": "a", "share": math.nan}]}, {"parts": [{"kind": "a", "share": math.inf}]},
        {"parts": [{"kind": "a", "share": 0.5}] * 4},
        {"numbers": [1, "2"]}, {"numbers": [True]}, {"numbers": [1.0]}, {"numbers": b"12"},
        {"unknown": 1}, {"": 1},
    ],
)  # fmt: skip
def test_wrong_types_and_unknown_fields_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as raised:
        Sample.from_cbor(encode_cbor(VALID | change))
    assert raised.value.code == "bad_document"


@pytest.mark.parametrize("missing", ["count", "name", "raw", "flag"])
def test_missing_fields_are_refused(missing: str) -> None:
    with pytest.raises(ProtocolError, match=missing):
        Sample.from_cbor(encode_cbor({name: value for name, value in VALID.items() if name != missing}))


@pytest.mark.parametrize("value", [None, 1, "text", b"bytes", [], [VALID], 1.5, True])
def test_what_is_no_map_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        Sample.from_cbor(encode_cbor(value))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty", b""),
        ("truncated", encode_cbor(VALID)[:-1]),
        ("followed by a byte", encode_cbor(VALID) + b"\x00"),
        ("followed by another document", encode_cbor(VALID) * 2),
        ("indefinite map", b"\xbf\x61a\x01\xff"),
        ("indefinite array", b"\x9f\x01\xff"),
        ("indefinite text", b"\x7f\x61a\xff"),
        ("indefinite bytes", b"\x5f\x41a\xff"),
        ("duplicate keys", b"\xa2\x61a\x01\x61a\x02"),
        ("integer keys", b"\xa1\x01\x02"),
        ("array keys", b"\xa1\x80\x01"),
        ("integer in more bytes than needed", b"\x18\x01"),
        ("float in more bytes than needed", b"\xfb" + b"\x00" * 8),
        ("keys out of order", b"\xa2\x61b\x01\x61a\x02"),
        ("bad UTF-8", b"\x61\xff"),
        ("array of 2^64 - 1 items", b"\x9b" + b"\xff" * 8),
        ("text of 2^63 bytes", b"\x7b\x7f" + b"\xff" * 7),
        ("bytes of 4 GiB", b"\x5a\xff\xff\xff\xff"),
        ("reserved simple value", b"\xfc"),
        ("deep arrays", b"\x81" * 20_000 + b"\x00"),
        ("deep maps", b"\xa1\x61a" * 5_000 + b"\x00"),
        ("deep tags", b"\xc6" * 20_000 + b"\x00"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_odd_cbor_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(ProtocolError) as raised:
        decode_cbor(data, limit=10**6)
    assert raised.value.code == "bad_cbor"


@pytest.mark.parametrize(
    "tag", [0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799, 7777]
)
@pytest.mark.parametrize("content", [b"\x18\x64", b"\x61a", b"\x41a", b"\x82\x01\x02", b"\xa0"])
def test_no_tag_is_decoded(tag: int, content: bytes) -> None:
    head = encode_cbor(cbor2.CBORTag(tag, 0))[:-1]
    with pytest.raises(ProtocolError):
        decode_cbor(head + content, limit=1_000)


def test_the_limit_comes_before_the_decoding() -> None:
    encoded = encode_cbor(VALID)
    with pytest.raises(ProtocolError) as raised:
        Sample.from_cbor(encoded, limit=len(encoded) - 1)
    assert raised.value.code == "too_large"
    assert Sample.from_cbor(encoded, limit=len(encoded)) == Sample.model_validate(VALID)


def test_errors_do_not_repeat_the_input() -> None:
    with pytest.raises(ProtocolError) as raised:
        Sample.from_cbor(encode_cbor(VALID | {"count": "x" * 5_000}))
    assert "xxx" not in raised.value.message
    assert sys.getsizeof(raised.value.message) < 500


def test_documents_are_immutable() -> None:
    document = Sample.model_validate(VALID)
    with pytest.raises(ValidationError):
        document.count = 4
    assert isinstance(document.parts, tuple)


class Names(Document):
    digest: Digest
    peer: PeerId


@pytest.mark.parametrize(
    ("digest", "peer"),
    [
        ("a" * 63, PEER), ("a" * 65, PEER), ("A" * 64, PEER), ("g" * 64, PEER), ("a" * 64 + "\n", PEER),
        ("../" + "a" * 61, PEER), ("a" * 64, PEER + "\n"), ("a" * 64, PEER[:40]), ("a" * 64, PEER[:-1] + "0"),
        ("a" * 64, PEER[:-1] + "/"), ("a" * 64, ""),
    ],
)  # fmt: skip
def test_names_that_become_paths_hold_nothing_else(digest: str, peer: str) -> None:
    Names(digest="a" * 64, peer=PEER)
    with pytest.raises(ProtocolError):
        Names.from_cbor(encode_cbor({"digest": digest, "peer": peer}))
