"""Checked reading of what an RPC answers: plain values out of JSON that anybody may have made up."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from azu.errors import ProtocolError

__all__ = ["digest", "listing", "optional", "quantity", "record", "text", "whole"]

T = TypeVar("T")

_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}", re.ASCII)
_DIGEST = re.compile(r"0x[0-9a-fA-F]{64}", re.ASCII)
_MAX_WHOLE = 2**64 - 1


def _unexpected(value: object, what: str) -> ProtocolError:
    return ProtocolError(f"{str(value)[:80]!r} is not {what}", code="rpc_bad_answer")


def quantity(value: object) -> int:
    """An EVM quantity, "0x1f"."""
    if not isinstance(value, str) or not _QUANTITY.fullmatch(value):
        raise _unexpected(value, "a quantity")
    return int(value, 16)


def digest(value: object) -> str:
    """An EVM hash of 32 bytes, in lower case."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _unexpected(value, "a hash")
    return value.lower()


def whole(value: object) -> int:
    """A number of Solana's: a JSON integer of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_WHOLE:
        raise _unexpected(value, "a number")
    return value


def text(value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise _unexpected(value, "a text")
    return value


def record(value: object) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise _unexpected(value, "an object")
    return value


def listing(read: Callable[[object], T]) -> Callable[[object], list[T]]:
    """A JSON array of what `read` reads."""

    def read_all(value: object) -> list[T]:
        if not isinstance(value, list):
            raise _unexpected(value, "a list")
        return [read(item) for item in value]

    return read_all


def optional(read: Callable[[object], T]) -> Callable[[object], T | None]:
    """Null, or what `read` reads."""
    return lambda value: None if value is None else read(value)
