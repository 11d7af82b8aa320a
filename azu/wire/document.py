"""Strict CBOR documents: what is sent in frames' headers and what is signed.

A document is a frozen pydantic model. Encoding is deterministic (RFC 8949, section 4.2). Decoding takes hostile bytes:
size, nesting and key types are bounded before anything is built, tags and trailing bytes are refused, unknown fields
and wrong types too, and nothing is coerced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self, TypeVar

import cbor2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from azu.errors import ProtocolError

__all__ = ["Digest", "Document", "PeerId", "Tuple", "decode_cbor", "encode_cbor", "reason"]

T = TypeVar("T")

# The deepest document is ticket -> stages -> entry -> field; the rest is room for extension.
_MAX_DEPTH = 12

# A tuple field; CBOR has only arrays, so a list is accepted for it.
Tuple = Annotated[tuple[T, ...], Field(strict=False)]
# A SHA-256 digest in lower-case hex.
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A base58 peer id; that it holds a key is checked where a signature is.
PeerId = Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{46,62}$")]


def _refuse_tag(*_: object) -> object:
    raise ValueError("tags are not allowed")


class _NoTags(dict[int, Callable[..., object]]):
    """Answers for every tag, built in or not: cbor2's own decoders reach regular expressions and shared references."""

    def __missing__(self, tag: int) -> Callable[..., object]:
        return _refuse_tag


_NO_TAGS = _NoTags()


def encode_cbor(value: Any) -> bytes:
    """Deterministic CBOR of plain values."""
    encoded: bytes = cbor2.dumps(value, canonical=True)
    return encoded


def decode_cbor(data: bytes | bytearray | memoryview, *, limit: int) -> Any:
    """Plain values out of hostile CBOR of at most `limit` bytes.

    Raises:
        ProtocolError: the bytes are over the limit, malformed, not deterministic, too deeply nested, or have tags or
            odd keys.
    """
    if len(data) > limit:
        raise ProtocolError(f"a document of {len(data)} bytes is over the limit of {limit}", code="too_large")
    try:
        value = cbor2.loads(
            data,
            semantic_decoders=_NO_TAGS,
            tag_hook=_refuse_tag,
            max_depth=_MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise ProtocolError(f"malformed CBOR: {error}", code="bad_cbor") from error
    # One value has one encoding; cbor2 also ignores what comes after the value.
    if encode_cbor(value) != data:
        raise ProtocolError("CBOR that is not deterministic, or is followed by other bytes", code="bad_cbor")
    return value


def reason(error: ValidationError) -> str:
    """A pydantic error as one short line: where and what, without the (possibly huge or secret) input."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{where}: {first['msg']}"


class Document(BaseModel):
    """Base of everything signed or sent. Instances are immutable and were checked when made."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def to_cbor(self) -> bytes:
        """The document's deterministic encoding."""
        return encode_cbor(self.model_dump())

    @classmethod
    def from_cbor(cls, data: bytes | bytearray | memoryview, *, limit: int = 65_536) -> Self:
        """Decode and check hostile bytes.

        Raises:
            ProtocolError: the bytes are not such a document.
        """
        try:
            return cls.model_validate(decode_cbor(data, limit=limit))
        except ValidationError as error:
            raise ProtocolError(f"not a {cls.__name__}: {reason(error)}", code="bad_document") from error
