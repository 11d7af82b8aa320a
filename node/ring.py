"""A stage's link to the next stage of its job: one stream, one direction for data, the other for credit.

The receiver lets the sender have at most `WINDOW` chunks under way and gives credit back as it takes them to compute,
so that a slow stage holds up its own jobs only and never fills anybody's memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from azu.channel import Channel, RefusedError
from azu.dialing import open_worker_stream
from azu.errors import NetworkError, ProtocolError
from azu.overlay import Overlay
from azu.wire.frames import Buffer
from azu.wire.messages import RING, RING_PROTOCOL, Chunk, Credit, Hello, Next, Refused

__all__ = ["GRANT", "WINDOW", "RingLink"]

# Chunks that may be under way to one stage for one job; of 4 MiB each at most.
WINDOW = 8
# Credit is given back for this many chunks at once: fewer small frames, and the window never runs empty.
GRANT = 4


class RingLink:
    """The sending end. `run()` owns the stream; `send_*` may be called from another task once it is open."""

    def __init__(self, overlay: Overlay, peer_id: str, hello: Hello) -> None:
        self._overlay = overlay
        self.peer_id = peer_id
        self._hello = hello
        self._channel: Channel | None = None
        self._open = trio.Event()
        self._credits = trio.Semaphore(WINDOW, max_value=WINDOW)

    async def run(self, on_open: Callable[[], Awaitable[None]]) -> None:
        """Dial the next stage, greet it, and take its credit until cancelled.

        Raises:
            NetworkError: it cannot be reached, refused, or went away.
            ProtocolError: it gave credit for what was never sent.
        """
        stream = await open_worker_stream(self._overlay, self.peer_id, RING_PROTOCOL)
        try:
            self._channel = Channel(stream, RING, max_body=0)
            await self._channel.send(self._hello)
            self._open.set()
            await on_open()
            await self._take_credit(self._channel)
        finally:
            await stream.aclose()

    async def _take_credit(self, channel: Channel) -> None:
        while (received := await channel.receive()) is not None:
            message, _ = received
            if isinstance(message, Refused):
                raise RefusedError(self.peer_id, message)
            if not isinstance(message, Credit) or self._credits.value + message.frames > WINDOW:
                raise ProtocolError(f"{self.peer_id} gave credit that it did not owe", code="bad_credit")
            for _ in range(message.frames):
                self._credits.release()
        raise NetworkError(f"{self.peer_id} closed the ring", code="stage_lost")

    async def send_chunk(self, chunk: Chunk, body: Buffer) -> None:
        """Send hidden states on, once there is credit; raises NetworkError if the peer is gone."""
        await self._credits.acquire()
        await (await self._opened()).send(chunk, body)

    async def send_next(self, message: Next) -> None:
        """Send a sampled token to the first stage; raises NetworkError if the peer is gone."""
        await (await self._opened()).send(message)

    async def _opened(self) -> Channel:
        await self._open.wait()
        if self._channel is None:
            raise NetworkError(f"{self.peer_id} is not connected", code="stage_lost")
        return self._channel
