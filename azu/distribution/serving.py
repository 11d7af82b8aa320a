"""The holder's side of /azu/layers/1: manifests, what is here, and ranges of files, within limits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import trio

from azu.channel import IDLE_S, Channel, refusal_of
from azu.distribution.library import Library
from azu.distribution.pace import Pace
from azu.errors import InternalError, ModelError, ProtocolError
from azu.overlay import BATCH_BYTES, OverlayStream
from azu.wire.messages import (
    LAYERS,
    MAX_RANGE_BYTES,
    BlobRange,
    GetBlob,
    GetManifest,
    HaveBlobs,
    ManifestReply,
    Message,
    Refused,
    WhichBlobs,
    encode_message,
)

__all__ = ["LayerServer"]

_SLOTS_PER_PEER = 2  # a second one for a peer whose first connection broke without a sign
_SLOT_IDLE_S = 5.0  # a stream that asks for nothing for so long makes room for another
# Written at once: a peer at 20 kB/s takes this within a stream's 15 s, and the limit of the rate is kept as finely.
_SLICE_BYTES = BATCH_BYTES
_LEAST_RATE = 65_536  # bytes per second of a slot: with a lower limit there are fewer of them
# A slot whose reader takes less for so long goes to the next who asks while there is no other: made-up identities could
# hold all of them for ever. It is about the rate at which a fetch itself gives a holder up (`Patience.piece`). Those
# that read fast have one network to come from: a slot of the network with most goes to one that has two fewer.
_SLOW_RATE = 32_768
_SLOW_S = 10.0
_MAX_COUNTED = 65_536  # files whose requests are counted
# Threads for strangers' requests, out of the 40 that all of a process shares: a slow disk must not take those.
_READERS, _LOOKERS = 8, 2

_BUSY = Refused(code="busy", message="as many peers are being served as may be", remedy="Ask again in some seconds")
_NOT_HERE = Refused(code="not_here", message="this is not here")


@dataclass
class _Slot:
    """A stream's right to be sent files."""

    idle_since: float = math.inf
    buffer: bytearray = field(default_factory=partial(bytearray, MAX_RANGE_BYTES))
    _since: float = field(default_factory=trio.current_time)
    _taken: int = 0  # bytes since then
    _rate: float = math.inf  # of the last _SLOW_S

    def took(self, size: int) -> None:
        """Note that the reader took so many bytes."""
        self._taken += size
        passed = trio.current_time() - self._since
        if passed >= _SLOW_S:
            self._rate = self._taken / passed
            self._since += passed
            self._taken = 0

    def rate(self) -> float:
        """How many bytes per second the reader took of late, pauses between its requests included."""
        passed = trio.current_time() - self._since
        return self._taken / passed if passed >= 2 * _SLOW_S else self._rate


class LayerServer:
    """Serves a library to other peers; `handle` is the handler of LAYERS_PROTOCOL.

    Args:
        slots: peers that files are sent to at once; others are told to come again, unless one of these hardly reads, or
            they come from a network that has fewer. Each takes up to 4 MiB of memory.
        rate: bytes of files per second, all peers together; None sends as fast as it can.
    """

    def __init__(self, library: Library, *, slots: int = 16, rate: int | None = None) -> None:
        self.sent_bytes = 0
        self._library = library
        self._slots = slots if rate is None else max(1, min(slots, rate // _LEAST_RATE))
        self._pace = Pace(rate) if rate is not None else None
        self._slow_rate = _SLOW_RATE if rate is None else min(_SLOW_RATE, rate / self._slots / 2)
        self._active: dict[OverlayStream, _Slot] = {}
        self._asked: Counter[str] = Counter()  # how often each file's beginning was asked for
        self._readers, self._lookers = trio.CapacityLimiter(_READERS), trio.CapacityLimiter(_LOOKERS)

    async def handle(self, stream: OverlayStream) -> None:
        """Answer one peer's requests until it ends the stream."""
        channel = Channel(stream, LAYERS, max_body=WhichBlobs.max_body)
        try:
            while (received := await channel.receive(IDLE_S)) is not None:
                try:
                    await self._answer(stream, channel, *received)
                except (ModelError, InternalError) as error:
                    await channel.send(refusal_of(error))
        finally:
            self._active.pop(stream, None)

    async def _answer(self, stream: OverlayStream, channel: Channel, request: Message, body: bytearray) -> None:
        if isinstance(request, GetManifest):
            envelope = await trio.to_thread.run_sync(self._library.envelope, request.digest, limiter=self._lookers)
            await (channel.send(_NOT_HERE) if envelope is None else channel.send(ManifestReply(), envelope))
        elif isinstance(request, WhichBlobs):
            here = await trio.to_thread.run_sync(self._which, bytes(body), limiter=self._lookers)
            await channel.send(HaveBlobs(), here)
        elif isinstance(request, GetBlob):
            slot = await self._admit(stream)
            if slot is None:
                await channel.send(_BUSY)
                return
            try:
                await self._send_range(channel, request, slot)
            finally:
                slot.idle_since = trio.current_time()
        else:
            raise ProtocolError(f"{type(request).__name__} is not a request", code="unexpected_message")

    def _which(self, digests: bytes) -> bytes:
        if len(digests) % 32:
            raise ProtocolError("a question that is not made of digests", code="bad_question")
        names = [digests[start : start + 32].hex() for start in range(0, len(digests), 32)]
        return bytes(1 + min(254, self._asked[name]) if self._library.store.has(name) else 0 for name in names)

    async def _admit(self, stream: OverlayStream) -> _Slot | None:
        now = trio.current_time()
        live = {each: slot for each, slot in self._active.items() if slot.idle_since > now - _SLOT_IDLE_S}
        if stream in live:
            live[stream].idle_since = math.inf
            return live[stream]
        is_full = len(live) >= self._slots
        victim = self._victim(live, stream) if is_full else None
        of_peer = sum(each.peer_id == stream.peer_id for each in live)
        if of_peer >= _SLOTS_PER_PEER or (is_full and victim is None):
            return None
        is_sending = victim is not None and live.pop(victim).idle_since == math.inf
        live[stream] = slot = _Slot()
        self._active = live
        if victim is not None and is_sending:
            await victim.reset()  # in the middle of a range there is no other way to stop
        return slot

    def _victim(self, live: dict[OverlayStream, _Slot], asking: OverlayStream) -> OverlayStream | None:
        """Whose slot another may have; None where all are read from as they should be, and no network has too many."""

        def slowest(streams: Iterable[OverlayStream]) -> OverlayStream:
            return min(streams, key=lambda each: live[each].rate())

        stream = slowest(live)
        if live[stream].rate() < self._slow_rate:
            return stream
        held = Counter(each.network for each in live)
        network, most = held.most_common(1)[0]
        if most < held[asking.network] + 2:  # else the two would take it from one another again and again
            return None
        return slowest(each for each in live if each.network == network)

    async def _send_range(self, channel: Channel, request: GetBlob, slot: _Slot) -> None:
        # One buffer for all ranges of a stream: memory that is new each time costs more than reading the file.
        data = await trio.to_thread.run_sync(self._read, request, slot.buffer, limiter=self._readers)
        if data is None:
            await channel.send(_NOT_HERE)
            return
        if request.offset == 0:
            self._asked[request.digest] += 1
            if len(self._asked) > _MAX_COUNTED:
                self._asked.clear()
        for part in encode_message(BlobRange(), data):
            view = memoryview(part)
            for start in range(0, len(view), _SLICE_BYTES):
                piece = view[start : start + _SLICE_BYTES]
                if self._pace is not None:
                    await trio.sleep(self._pace.delay(len(piece), trio.current_time()))
                await channel.stream.send_all(piece)
                slot.took(len(piece))
        self.sent_bytes += len(data)

    def _read(self, request: GetBlob, buffer: bytearray) -> memoryview | None:
        """The range, out of a file whose bytes this process has verified; None where there is none such."""
        store = self._library.store
        if not store.check(request.digest):
            return None
        view = memoryview(buffer)[: request.length]
        if store.read_into(request.digest, request.offset, view) != request.length:
            raise ModelError(f"the file ends before {request.offset + request.length}", code="no_such_range")
        return view
