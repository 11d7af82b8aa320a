"""A message channel: one protocol's messages over one stream."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from azu.errors import AzuError, InternalError, NetworkError, ProtocolError
from azu.wire.frames import Buffer, FrameReader
from azu.wire.messages import Codec, Message, Refused, encode_message

__all__ = ["IDLE_S", "Channel", "RefusedError", "Stream", "refusal_of"]

M = TypeVar("M", bound=Message)

_READ_BYTES = 262_144
# A stream of requests on which none comes for this long is ended, so that strangers cannot pile up silent ones.
IDLE_S = 120.0


class Stream(Protocol):
    """What a channel needs of a stream; azu.overlay.OverlayStream is the real one."""

    @property
    def peer_id(self) -> str: ...

    def receive_buffers(self, max_bytes: int) -> Awaitable[list[Buffer]]: ...

    def send_all(self, *buffers: Buffer) -> Awaitable[None]: ...

    def send_eof(self) -> Awaitable[None]: ...

    def aclose(self) -> Awaitable[None]: ...

    def reset(self) -> Awaitable[None]: ...


class Channel:
    """Sends and receives the messages of one protocol. It does not own the stream: whoever opened it closes it.

    Receiving is safe to cancel; sending is never cut inside a frame (the stream sees to that).
    """

    def __init__(
        self,
        stream: Stream,
        codec: Codec,
        *,
        max_body: int | None = None,
        allocate: Callable[[int], bytearray] = bytearray,
    ) -> None:
        self.stream = stream
        self._codec = codec
        self._reader = FrameReader(max_body=codec.max_body if max_body is None else max_body, allocate=allocate)

    @property
    def peer_id(self) -> str:
        """The authenticated peer at the other end."""
        return self.stream.peer_id

    def limit_body(self, max_body: int) -> None:
        """From the next frame on, refuse bodies of more than `max_body` bytes before they are allocated."""
        self._reader.max_body = max_body

    async def send(self, message: Message, body: Buffer = b"") -> None:
        """Write one message.

        Raises:
            NetworkError: the stream is gone, or the peer does not read.
        """
        await self.stream.send_all(*encode_message(message, body))

    async def receive(self, idle: float = math.inf, *, silence: float = math.inf) -> tuple[Message, bytearray] | None:
        """The next message with its body, or None when the peer ended or reset the stream between two frames.

        Args:
            idle: seconds after which a message that has not come complete counts as the end of the stream.
            silence: seconds without a byte that are a fault.

        Raises:
            trio.TooSlowError: `silence` lasted too long.
            ProtocolError: the bytes are not this protocol's. The stream must be reset.
            NetworkError: the stream broke inside a frame.
        """
        if idle == silence == math.inf:  # scopes are for time: the ring's next step waits for this
            return await self._receive()
        with trio.move_on_after(idle):
            return await self._receive(silence)
        return None

    async def _receive(self, silence: float = math.inf) -> tuple[Message, bytearray] | None:
        while (frame := self._reader.next_frame()) is None:
            if silence == math.inf:
                buffers = await self.stream.receive_buffers(_READ_BYTES)
            else:
                with trio.fail_after(silence):
                    buffers = await self.stream.receive_buffers(_READ_BYTES)
            if not buffers:
                if self._reader.is_idle:
                    return None
                raise NetworkError(f"{self.peer_id} went away in the middle of a frame", code="stream_broken")
            for buffer in buffers:
                self._reader.receive_data(buffer)
        return self._codec.decode(frame), frame.body

    async def expect(self, *kinds: type[M]) -> tuple[M, bytearray]:
        """The next message, which has to be of one of these kinds.

        Raises:
            RefusedError: the peer refused instead.
            ProtocolError: the peer sent something else.
            NetworkError: the peer went away.
        """
        received = await self.receive()
        if received is None:
            raise NetworkError(f"{self.peer_id} closed the stream", code="stream_closed")
        message, body = received
        if isinstance(message, Refused):
            raise RefusedError(self.peer_id, message)
        if not isinstance(message, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ProtocolError(f"expected {expected}, got {type(message).__name__}", code="unexpected_message")
        return message, body


class RefusedError(NetworkError):
    """A peer answered with a refusal; `code` and `remedy` are the peer's own words."""

    def __init__(self, peer_id: str, refusal: Refused) -> None:
        super().__init__(f"{peer_id} refused: {refusal.message}", code=refusal.code, remedy=refusal.remedy)
        self.peer_id = peer_id


def refusal_of(error: AzuError) -> Refused:
    """An error as the refusal to send; a local fault's details stay here."""
    if isinstance(error, InternalError):
        return Refused(code="internal", message="internal error")
    return Refused(code=error.code, message=error.message[:2_000], remedy=error.remedy[:2_000])
