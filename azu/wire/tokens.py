"""Token ids as they travel."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from azu.errors import ProtocolError
from azu.wire.frames import Buffer

__all__ = ["pack_tokens", "unpack_tokens"]


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """uint32 each, little-endian."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def unpack_tokens(body: Buffer) -> tuple[int, ...]:
    """The token ids of a body; raises ProtocolError, code "bad_tokens", where it ends in the middle of one."""
    if len(body) % 4:
        raise ProtocolError(f"{len(body)} bytes are no whole number of token ids", code="bad_tokens")
    return struct.unpack(f"<{len(body) // 4}I", body)
