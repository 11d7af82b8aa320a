"""The conversation with one holder of files, in which questions and requests overtake no answer."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from azu.channel import Channel
from azu.dialing import open_worker_stream
from azu.distribution.schedule import Piece
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.models.pieces import piece_span
from azu.wire.messages import (
    LAYERS,
    LAYERS_PROTOCOL,
    MAX_ASKED,
    MAX_RANGE_BYTES,
    BlobRange,
    GetBlob,
    HaveBlobs,
    Message,
    Refused,
    WhichBlobs,
)

if TYPE_CHECKING:
    from azu.distribution.fetching import Fetch

__all__ = ["DEPTH", "Holder"]

DEPTH = 2  # pieces asked of one holder at once: one comes in, and the next is under way
_MAX_SENDING = 8  # holders that pieces are asked of at once; 32 MiB of pieces that come in
_MAX_FAULTS = 4  # in a row, after which a holder is left until a look-up finds it again
_LOOK_S = 0.5  # an idle holder is looked at so often: another's piece may have become late
_CHANCE = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class _Question:
    digests: list[str]


class Holder:
    """One peer, for the time of one fetch. Cancelling `scope` ends it."""

    def __init__(self, peer_id: str, fetch: Fetch) -> None:
        self.peer_id = peer_id
        self.scope = trio.CancelScope()
        self._fetch = fetch
        self._pending: deque[Piece | _Question] = deque()  # requests that are not answered yet, in their order
        self._holds: dict[str, int] = {}
        self._refused: set[str] = set()  # files that it said it has, and then has not
        self._next_question = -math.inf
        self._busy_until = -math.inf
        self._faults = 0

    async def run(self) -> None:
        """Fetch from this peer until cancelled, or it fails again and again, or breaks the protocol."""
        with self.scope:
            while self._faults < _MAX_FAULTS:
                try:
                    await self._connect()
                except (AzuError, trio.TooSlowError) as error:
                    self._fetch.leave(self.peer_id, error)
                    if isinstance(error, ProtocolError | TrustError):
                        return
                self._faults += 1
                await trio.sleep(self._fetch.patience.retry * 2 ** (self._faults - 1))

    async def _connect(self) -> None:
        self._pending.clear()
        self._next_question = self._busy_until = -math.inf
        try:
            async with await open_worker_stream(self._fetch.overlay, self.peer_id, LAYERS_PROTOCOL) as stream:
                await self._converse(
                    Channel(stream, LAYERS, max_body=MAX_RANGE_BYTES, allocate=self._fetch.buffers.take)
                )
        finally:
            self._fetch.sending.discard(self.peer_id)
            self._fetch.schedule.offer(self.peer_id, {})
            self._fetch.schedule.drop(self.peer_id)
            self._fetch.wake()

    async def _converse(self, channel: Channel) -> None:
        while True:
            await self._ask(channel)
            if self._pending:
                await self._hear(channel)
            else:
                self._fetch.sending.discard(self.peer_id)
                with trio.move_on_after(min(_LOOK_S, self._fetch.patience.refresh)):
                    await self._fetch.changed.wait()

    async def _ask(self, channel: Channel) -> None:
        schedule, now = self._fetch.schedule, trio.current_time()
        if now >= self._next_question:
            self._next_question = now + self._fetch.patience.refresh
            question = _Question(schedule.missing[:MAX_ASKED])
            self._pending.append(question)
            await channel.send(WhichBlobs(), b"".join(map(bytes.fromhex, question.digests)))
        if now < self._busy_until or not self._may_send():
            return
        while (piece := schedule.next(self.peer_id, now)) is not None:
            self._fetch.sending.add(self.peer_id)
            self._pending.append(piece)
            offset, length = self._span(piece)
            await channel.send(GetBlob(digest=piece.digest, offset=offset, length=length))

    def _may_send(self) -> bool:
        return self.peer_id in self._fetch.sending or len(self._fetch.sending) < _MAX_SENDING

    async def _hear(self, channel: Channel) -> None:
        """Take the answer to what was asked first."""
        request = self._pending[0]
        with trio.fail_after(self._fetch.patience.piece):
            received = await channel.receive(silence=self._fetch.patience.stall)
        if received is None:
            raise NetworkError(f"{self.peer_id} closed the stream", code="stream_closed")
        self._pending.popleft()
        if isinstance(request, _Question):
            self._learn(request, *received)
        else:
            await self._take(channel, request, *received)

    async def _take(self, channel: Channel, piece: Piece, message: Message, body: bytearray) -> None:
        if isinstance(message, Refused):
            self._note_refusal(piece, message)
            return
        if not isinstance(message, BlobRange) or len(body) != self._span(piece)[1]:
            raise ProtocolError(f"{self.peer_id} sent another range than asked for", code="bad_range")
        if self._fetch.schedule.received(self.peer_id, piece, trio.current_time()):
            self._faults = 0
            try:
                await self._ask(channel)  # before the piece is handed over, which may have to wait
                await self._fetch.to_store(self.peer_id, piece, body)
            except BaseException:
                self._fetch.schedule.failed(self.peer_id, piece)
                raise

    def _span(self, piece: Piece) -> tuple[int, int]:
        """Offset and length in bytes."""
        return piece_span(self._fetch.blobs[piece.digest].size, piece.index)

    def _learn(self, question: _Question, message: Message, body: bytearray) -> None:
        if isinstance(message, Refused):
            raise NetworkError(f"{self.peer_id} refused: {message.message}", code=message.code)
        if not isinstance(message, HaveBlobs) or len(body) != len(question.digests):
            raise ProtocolError(f"{self.peer_id} gave no answer to a question", code="bad_answer")
        answers = zip(question.digests, body, strict=True)
        self._holds = {digest: asked - 1 for digest, asked in answers if asked and digest not in self._refused}
        self._fetch.schedule.offer(self.peer_id, self._holds)

    def _note_refusal(self, piece: Piece, refusal: Refused) -> None:
        self._fetch.faults[self.peer_id] = f"it refused: {refusal.message}"
        if refusal.code == "busy":
            self._busy_until = trio.current_time() + self._fetch.patience.busy * _CHANCE.uniform(0.5, 1.5)
        else:
            self._refused.add(piece.digest)
            self._holds.pop(piece.digest, None)
            self._fetch.schedule.offer(self.peer_id, self._holds)
        self._fetch.schedule.failed(self.peer_id, piece)
        self._fetch.wake()
