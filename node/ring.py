"""The sending end of a ring: one stream to the next stage, one direction for data, the other for credit.

The receiver lets the sender have at most `WINDOW` chunks under way and gives credit back as it takes them to compute,
so that a slow stage holds up its own jobs only and never fills anybody's memory.

A stream that goes through a relay is left for one on a direct connection, once there is one:

    relayed   hello {0} ─► chunks ─►                            moved {1} ─►         ◄─ credit, moved {1}
    direct                            hello {1} ─► ◄─ welcome                                               chunks ─►

Nothing is sent on the second before everything on the first has been read, so that nothing overtakes, and a second
that fails before that costs the job nothing. `node/intake.py` is the other end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import trio

from azu.channel import Channel, RefusedError
from azu.dialing import open_worker_stream
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.logs import log
from azu.overlay import Overlay
from azu.wire.frames import Buffer
from azu.wire.messages import (
    MAX_PART,
    RING,
    RING_PROTOCOL,
    Chunk,
    Credit,
    Hello,
    Message,
    Moved,
    Next,
    Refused,
    Welcome,
    encode_message,
)
from node.instruments import RingMeter
from node.packs import PackLink, Packs

__all__ = ["GRANT", "TOKEN_GRANT", "WINDOW", "RingLink"]

logger = logging.getLogger(__name__)

# Chunks that may be under way to one stage for one job; of 4 MiB each at most.
WINDOW = 8
# Credit is given back for this many chunks at once: fewer small frames, and the window never runs empty.
GRANT = 4
# The same after a chunk of one row: of decoded tokens, one is under way at a time.
TOKEN_GRANT = WINDOW - 1
# A direct connection that came about has this long to prove of use, ...
_WELCOME_S = 10.0
# ... or else it, or the next one, is tried after this pause, MAX_PART times in all.
_RETRY_S = 5.0


class RingLink:
    """The sending end. `run()` owns the streams; `send_*` may be called from another task once it is open.

    Attributes:
        pack: the stream for decoded tokens of all jobs, while there is a direct connection to the next stage.
    """

    def __init__(
        self, overlay: Overlay, peer_id: str, hello: Hello, packs: Packs, meter: RingMeter | None = None
    ) -> None:
        self._overlay = overlay
        self._meter = meter or RingMeter()
        self.peer_id = peer_id
        self.pack: PackLink | None = None
        self._packs = packs
        self._hello = hello
        self._channel: Channel | None = None
        self._is_relayed = False
        self._next: Channel | None = None  # while the ring moves to it
        self._open = trio.Event()  # another one from the last frame on a stream to the first on the next
        self._credits = trio.Semaphore(WINDOW, max_value=WINDOW)

    async def run(self, on_open: Callable[[], Awaitable[None]]) -> None:
        """Dial the next stage, greet it, and take its credit until cancelled.

        Raises:
            NetworkError: it cannot be reached, refused, or went away.
            ProtocolError: it gave credit for what was never sent.
        """
        stream = await open_worker_stream(self._overlay, self.peer_id, RING_PROTOCOL)
        self._channel, self._is_relayed = Channel(stream, RING, max_body=0), stream.is_relayed
        try:
            await self._channel.send(self._hello)
            self._open.set()
            await on_open()
            if stream.is_relayed:
                await self._leave_relay(self._channel)
            with self._packs.held(self.peer_id, self._meter) as self.pack:
                await self._take_credit(self._channel)
        finally:
            self.pack = None
            for channel in (self._channel, self._next):
                if channel is not None:
                    await channel.stream.aclose()

    async def _take_credit(self, channel: Channel) -> Channel:
        """Until the receiver follows to another stream, which is returned; never, where it was not asked to."""
        while (received := await channel.receive()) is not None:
            message, _ = received
            if isinstance(message, Refused):
                raise RefusedError(self.peer_id, message)
            if isinstance(message, Moved) and self._next is not None:
                return self._next
            if not isinstance(message, Credit) or self._credits.value + message.frames > WINDOW:
                raise ProtocolError(f"{self.peer_id} gave credit that it did not owe", code="bad_credit")
            for _ in range(message.frames):
                self._credits.release()
        raise NetworkError(f"{self.peer_id} closed the ring", code="stage_lost")

    async def _leave_relay(self, relayed: Channel) -> None:
        """Take credit on a relayed stream until the ring has moved to a direct one."""
        failure: AzuError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._move, relayed)
            try:
                self._channel, self._next = await self._take_credit(relayed), None
            except AzuError as error:  # carried past the nursery, which would wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        self._is_relayed = False
        self._open.set()
        log(logger, logging.INFO, "ring left its relay", job=self._hello.job_id.hex(), peer=self.peer_id)
        await relayed.stream.aclose()

    async def _move(self, relayed: Channel) -> None:
        """Ask the receiver to follow once there is a direct connection. What fails leaves the ring on its relay."""
        for part in range(1, MAX_PART + 1):
            await self._overlay.until_direct(self.peer_id)
            try:
                self._next = await self._offer(part)
            except AzuError as error:
                log(logger, logging.DEBUG, "ring stays on its relay", peer=self.peer_id, reason=str(error))
                if isinstance(error, ProtocolError):
                    self._overlay.count_violation(self.peer_id)
                await trio.sleep(_RETRY_S)
                continue
            self._open = trio.Event()  # whoever is sending already comes first
            try:
                await relayed.send(Moved(part=part))
            except NetworkError as error:  # the reader of this stream sees its end, and reports it
                log(logger, logging.DEBUG, "relay lost", peer=self.peer_id, reason=str(error))
            return

    async def _offer(self, part: int) -> Channel:
        """A stream on the direct connection that the receiver is ready to follow to. Raises AzuError."""
        stream = await self._overlay.open_stream(self.peer_id, RING_PROTOCOL)
        try:
            if stream.is_relayed:
                raise NetworkError(f"the direct connection to {self.peer_id} is gone again")
            channel = Channel(stream, RING, max_body=0)
            with trio.move_on_after(_WELCOME_S) as patience:
                await channel.send(self._hello.model_copy(update={"part": part}))
                await channel.expect(Welcome)
            if patience.cancelled_caught:
                raise NetworkError(f"{self.peer_id} did not say welcome for {_WELCOME_S:g} s", code="peer_silent")
        except BaseException:
            await stream.reset()
            raise
        return channel

    @property
    def is_ready(self) -> bool:
        """Whether a chunk can be sent without waiting for credit, or for a stream."""
        return self._credits.value > 0 and self._open.is_set()

    async def send_chunk(self, chunk: Chunk, body: Buffer) -> None:
        """Send hidden states on, once there is credit; raises NetworkError if the peer is gone."""
        try:
            self._credits.acquire_nowait()  # without a trip through the scheduler
        except trio.WouldBlock:
            since = time.perf_counter()
            await self._credits.acquire()
            self._meter.credit_s += time.perf_counter() - since
        await self._send(await self._opened(), chunk, body)

    async def send_next(self, message: Next) -> None:
        """Send a sampled token to the first stage; raises NetworkError if the peer is gone."""
        await self._send(await self._opened(), message)

    async def _send(self, channel: Channel, message: Message, body: Buffer = b"") -> None:
        """As the channel's own, in two parts that are timed apart."""
        started = time.perf_counter()
        buffers = encode_message(message, body)
        serialised = time.perf_counter()
        try:
            await channel.stream.send_all(*buffers)
        finally:
            seconds = time.perf_counter() - serialised
            self._meter.note_sent(len(body), serialised - started, seconds)
            links, now = self._meter.links, trio.current_time()
            links.note_sent(self.peer_id, len(body), seconds, is_relayed=self._is_relayed, now=now)

    async def _opened(self) -> Channel:
        """The stream in use. A frame that is sent on it without another await is ahead of `moved`."""
        while not self._open.is_set():
            await self._open.wait()
        if self._channel is None:
            raise NetworkError(f"{self.peer_id} is not connected", code="stage_lost")
        return self._channel
