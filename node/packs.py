"""Decoded tokens on their way to a neighbour: those of all jobs that are there at once leave in one frame.

Of a job one decoded token is under way at a time, and its position says what it comes after: it needs neither credit
nor an order beside others. So all jobs between two workers share one stream for them, where there is a direct
connection. What a job's ring stream costs for each token (`ring`: a frame, its checks, and the turns of three tasks at
either end) is then paid once for a whole pass. Everything else of a job stays on its ring stream; so do its tokens,
where the neighbour has no such stream open. A last stage's tokens go to the job's coordinator in the same way, and by
its job stream otherwise.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import trio

from azu.channel import Channel
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.logs import log
from azu.overlay import Overlay
from azu.wire.frames import Buffer
from azu.wire.messages import MAX_PACK_BYTES, MAX_PACKED, PACK, PACK_PROTOCOL, Message, Nexts, Rows, encode_message
from azu.wire.tensors import ITEMSIZE, DType, TensorHeader
from node.instruments import RingMeter

__all__ = ["Entry", "PackLink", "Packs", "entries_of"]

logger = logging.getLogger(__name__)

# A stream is kept for so long after the last job that needed it: the next one comes soon.
_LINGER_S = 30.0
# A neighbour that has closed it, or does not speak the protocol, is asked again after this pause.
_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Entry:
    """What one job has in a pack: hidden states of a position, or a sampled token.

    Attributes:
        position: of the hidden states, or the token's index.
        body: the hidden states [width] in `dtype`; empty for a token.
        token: -1 where there are hidden states.
    """

    job_id: bytes
    epoch: int
    position: int
    body: Buffer = b""
    dtype: DType = "float32"
    token: int = -1

    @property
    def kind(self) -> tuple[DType, int]:
        """Entries of one kind can share a frame; the width is 0 for tokens."""
        return self.dtype, len(self.body) // ITEMSIZE[self.dtype]


# Called once an entry has left, or cannot leave any more.
Then = Callable[[AzuError | None], None]


class PackLink:
    """The sending end of one peer's stream.

    Args:
        meter: counts what is sent, where that is the ring's.

    Attributes:
        is_open: whether entries can be added.
        holders: jobs that may add some.
    """

    def __init__(self, overlay: Overlay, peer_id: str, meter: RingMeter | None = None) -> None:
        self.is_open = False
        self.holders = 0
        self._overlay = overlay
        self._peer_id = peer_id
        self._meter = meter
        self._waiting: list[tuple[Entry, Then]] = []
        self._has_work = trio.Event()

    def add(self, entry: Entry, then: Then) -> None:
        """Send an entry, together with what else is added in this turn of the event loop. It must be open."""
        self._waiting.append((entry, then))
        self._has_work.set()

    async def until_unused(self) -> None:
        """Wait until nobody has held the link for a while."""
        unused = 0
        while unused < _LINGER_S:
            await trio.sleep(1)
            unused = 0 if self.holders else unused + 1

    async def keep_open(self) -> None:
        """Have a stream to the peer, whenever that takes one, until cancelled."""
        while True:
            try:
                await self._serve()
            except AzuError as error:
                log(logger, logging.DEBUG, "tokens go by ring streams", peer=self._peer_id, reason=str(error))
                if isinstance(error, ProtocolError):
                    self._overlay.count_violation(self._peer_id)
            await trio.sleep(_RETRY_S)

    async def _serve(self) -> None:
        """Open a stream, and send on it until it ends, which is an error."""
        async with await self._overlay.open_stream(self._peer_id, PACK_PROTOCOL) as stream:
            if stream.is_relayed:
                raise NetworkError(f"the direct connection to {self._peer_id} is gone")
            stream.hurry()
            channel = Channel(stream, PACK, max_body=0)
            error: AzuError = NetworkError(f"{self._peer_id} closed the stream of packs", code="stage_lost")

            async def until_lost(part: Callable[[Channel], Awaitable[None]]) -> None:
                nonlocal error
                try:
                    await part(channel)
                except AzuError as lost:  # carried past the nursery, which would wrap it in a group
                    error = lost
                nursery.cancel_scope.cancel()

            self.is_open = True
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(until_lost, self._send)
                    nursery.start_soon(until_lost, self._until_closed)
            finally:
                self.is_open = False
            waiting, self._waiting = self._waiting, []
            for _, then in waiting:  # not where this end gives up: then the neighbour is not lost
                then(error)
            raise error

    async def _until_closed(self, channel: Channel) -> None:
        if await channel.receive() is not None:
            raise ProtocolError(f"{self._peer_id} answered a pack", code="unexpected_message")

    async def _send(self, channel: Channel) -> None:
        while True:
            while not self._waiting:
                self._has_work = trio.Event()
                await self._has_work.wait()
            count = self._next_pack()
            await self._send_pack(channel, [entry for entry, _ in self._waiting[:count]])
            sent = self._waiting[:count]
            del self._waiting[:count]
            for _, then in sent:
                then(None)

    def _next_pack(self) -> int:
        """How many of the entries that wait can share a frame."""
        first, _ = self._waiting[0]
        most = min(MAX_PACKED, MAX_PACK_BYTES // max(1, len(first.body)))
        alike = takewhile(lambda each: each[0].kind == first.kind, self._waiting[:most])
        return sum(1 for _ in alike)

    async def _send_pack(self, channel: Channel, entries: list[Entry]) -> None:
        started = time.perf_counter()
        body = b"".join(entry.body for entry in entries)
        buffers = encode_message(_message(entries), body)
        serialised = time.perf_counter()
        await channel.stream.send_all(*buffers)
        seconds = time.perf_counter() - serialised
        if self._meter is None:
            return
        self._meter.note_sent(len(body), serialised - started, seconds)
        self._meter.links.note_sent(self._peer_id, len(body), seconds, is_relayed=False, now=trio.current_time())


def _message(entries: list[Entry]) -> Message:
    dtype, width = entries[0].kind
    if not width:
        return Nexts(jobs=tuple((each.job_id, each.epoch, each.position, each.token) for each in entries))
    header = TensorHeader(dtype=dtype, shape=(len(entries), width))
    return Rows(jobs=tuple((each.job_id, each.epoch, each.position) for each in entries), tensor=header)


def entries_of(message: Message, body: bytearray) -> list[Entry]:
    """What a neighbour has sent in one frame. Bodies are parts of the frame's own.

    Raises:
        ProtocolError: the tensor is not one position of each job.
    """
    if isinstance(message, Nexts):
        return [Entry(job_id, epoch, index, token=token) for job_id, epoch, index, token in message.jobs]
    if not isinstance(message, Rows):
        raise ProtocolError(f"{type(message).__name__} in a pack", code="unexpected_message")
    shape, dtype = message.tensor.shape, message.tensor.dtype
    if len(shape) != 2 or shape[0] != len(message.jobs) or message.tensor.nbytes != len(body):
        raise ProtocolError(f"{list(shape)} for {len(message.jobs)} jobs in a pack", code="bad_tensor")
    size, view = len(body) // shape[0], memoryview(body)
    return [
        Entry(job_id, epoch, position, view[size * number : size * (number + 1)], dtype)
        for number, (job_id, epoch, position) in enumerate(message.jobs)
    ]


class Packs:
    """Those of one worker, to neighbours and coordinators of the jobs that run there. `run()` owns the streams."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._links: dict[str, PackLink] = {}
        self._wanted_in, self._wanted = trio.open_memory_channel[str](math.inf)

    async def run(self) -> None:
        """Open streams as they are needed, and close them, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for peer_id in self._wanted:
                nursery.start_soon(self._run_link, peer_id)

    async def _run_link(self, peer_id: str) -> None:
        link = self._links[peer_id]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.keep_open)
            await link.until_unused()
            del self._links[peer_id]  # whoever comes while it closes gets another one
            nursery.cancel_scope.cancel()

    @contextmanager
    def held(self, peer_id: str, meter: RingMeter | None = None) -> Iterator[PackLink]:
        """The link to a peer. It opens soon, if there is a direct connection and that peer takes packs.

        Args:
            meter: see `PackLink`; where the link is there already, it has one.
        """
        link = self._links.get(peer_id)
        if link is None:
            link = self._links[peer_id] = PackLink(self._overlay, peer_id, meter)
            self._wanted_in.send_nowait(peer_id)
        link.holders += 1
        try:
            yield link
        finally:
            link.holders -= 1
