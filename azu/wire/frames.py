"""Frames: how messages and tensors are delimited on a stream.

    frame := header length (u32, big endian) | body length (u32, big endian) | header (CBOR) | body (raw bytes)

The header is a small CBOR message; the body is a tensor's or file's bytes, never wrapped in CBOR, so that it is written
from the buffer it lies in and read into the buffer it is used from. Both lengths are checked against the reader's
limits before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from azu.errors import ProtocolError

__all__ = ["MAX_HEADER_BYTES", "Buffer", "Frame", "FrameReader", "encode_frame"]

Buffer = bytes | bytearray | memoryview

_PREFIX = struct.Struct(">II")
# Largest header: an error message of 2,000 characters; everything larger travels as a body.
MAX_HEADER_BYTES = 16_384
# Bodies up to this size are joined with their header, so that a frame costs one socket call; copying them is cheaper.
_JOIN_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: its CBOR header and its body, which the receiver owns and may use in place."""

    header: bytes
    body: bytearray


def encode_frame(header: bytes, body: Buffer = b"") -> tuple[Buffer, ...]:
    """The buffers to write, in order, for one frame; a large `body` is passed through uncopied.

    `body` must be contiguous bytes (for a tensor: a memoryview cast to "B").
    """
    prefix = _PREFIX.pack(len(header), len(body))
    if len(body) <= _JOIN_BYTES:
        return (b"".join((prefix, header, body)),)
    return (prefix + header, body)


class FrameReader:
    """Cuts received bytes into frames. Sans-IO: `receive_data()` takes bytes, `next_frame()` returns what is complete.

    Args:
        max_body: the largest body in bytes that this stream may carry at this time; it may be raised or lowered
            between frames through the attribute.
        allocate: makes the buffer of so many bytes that a frame's body will own; what is in it does not matter.
    """

    def __init__(self, *, max_body: int, allocate: Callable[[int], bytearray] = bytearray) -> None:
        self.max_body = max_body
        self._allocate = allocate
        self._buffer = bytearray()
        self._frame: Frame | None = None  # the frame being read: its header is complete, its body not yet
        self._filled = 0  # bytes of its body that are there

    def receive_data(self, data: Buffer) -> None:
        """Take bytes as they came off the stream.

        A body's bytes go straight into the buffer that the frame will own: one copy.
        """
        view = memoryview(data)
        if self._frame is not None and not self._buffer:
            view = view[self._fill(self._frame.body, view) :]
        self._buffer += view

    def next_frame(self) -> Frame | None:
        """The next complete frame, or None until more bytes come.

        Raises:
            ProtocolError: a length is over its limit. The stream cannot be read on and must be reset.
        """
        if self._frame is None:
            self._frame = self._read_head()
            self._filled = 0
        if self._frame is None:
            return None
        if self._buffer and self._filled < len(self._frame.body):
            with memoryview(self._buffer) as view:
                taken = self._fill(self._frame.body, view)
            del self._buffer[:taken]
        if self._filled < len(self._frame.body):
            return None
        frame, self._frame = self._frame, None
        return frame

    @property
    def is_idle(self) -> bool:
        """Whether the bytes so far end exactly at a frame's end."""
        return not self._buffer and self._frame is None

    def _fill(self, body: bytearray, view: memoryview) -> int:
        """Copy what belongs to the body being read; return how many bytes that was."""
        taken = min(len(view), len(body) - self._filled)
        body[self._filled : self._filled + taken] = view[:taken]
        self._filled += taken
        return taken

    def _read_head(self) -> Frame | None:
        if len(self._buffer) < _PREFIX.size:
            return None
        header_length, body_length = _PREFIX.unpack_from(self._buffer)
        if header_length > MAX_HEADER_BYTES:
            raise ProtocolError(f"a frame header of {header_length} bytes is over the limit", code="too_large")
        if body_length > self.max_body:
            raise ProtocolError(
                f"a frame body of {body_length} bytes is over the limit of {self.max_body}", code="too_large"
            )
        end = _PREFIX.size + header_length
        if len(self._buffer) < end:
            return None
        header = bytes(self._buffer[_PREFIX.size : end])
        del self._buffer[:end]
        return Frame(header, self._allocate(body_length))
