"""One Yamux stream: reading without a copy, and writing within the window. See `_yamux`."""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_ACK,
    FLAG_SYN,
    TYPE_DATA,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    YamuxStream,
)

from azu.overlay._link import Buffer, Inbox
from azu.overlay._outbox import SMALL_BYTES

if TYPE_CHECKING:
    from azu.overlay._yamux import AzuYamux

__all__ = ["BATCH_BYTES", "HEADER", "AzuYamuxStream"]

logger = logging.getLogger(__name__)

MAX_PAYLOAD = 65_507  # bytes: 65519 (Noise plaintext) - 12 (Yamux header)
MAX_WINDOW = 4 * 1024 * 1024  # bytes one stream may have in flight towards us; 80 MB/s at 50 ms
MAX_BATCH = 4  # frames of one stream that are written at once; the next stream waits for them
BATCH_BYTES = MAX_BATCH * MAX_PAYLOAD  # whoever writes in slices best takes slices of so much
WINDOW_SECONDS = 15.0  # a remote that grants no window for so long loses the stream

HEADER = struct.Struct(YAMUX_HEADER_FORMAT)


class AzuYamuxStream(YamuxStream):
    """One stream. `send_window` and `recv_window` are bytes that may still be sent in either direction."""

    conn: AzuYamux

    def __init__(self, stream_id: int, conn: AzuYamux, is_initiator: bool) -> None:
        super().__init__(stream_id, conn, is_initiator)
        self.is_urgent = False  # whether its frames overtake those of others, however large they are
        self.window_opened = trio.Event()
        self.owed = FLAG_SYN if is_initiator else FLAG_ACK  # flags for the next frame
        self._unreturned = 0  # bytes read but not yet given back as credit

    @property
    def has_unread(self) -> bool:
        """Whether a read would return at once."""
        return bool(self.conn.stream_buffers.get(self.stream_id))

    def pay(self) -> int:
        """Flags that the next frame has to carry, once."""
        owed, self.owed = self.owed, 0
        return owed

    async def read(self, n: int | None = -1) -> bytes:
        """Up to n bytes as soon as there are any; cancelling loses none."""
        if n == 0:
            return b""
        return b"".join(await self.read_buffers(MAX_WINDOW if n is None or n < 0 else n))

    async def read_buffers(self, limit: int) -> list[Buffer]:
        """The same without a copy."""
        conn, sid = self.conn, self.stream_id
        await trio.lowlevel.checkpoint_if_cancelled()
        has_waited = False
        while True:
            inbox = conn.stream_buffers.get(sid)
            if inbox:
                before = len(inbox)
                data = inbox.take(limit)
                await self._give_credit(before - len(inbox), has_waited)
                return data
            if self.reset_received:
                raise MuxedStreamReset("stream was reset")
            event = conn.stream_events.get(sid)
            if self.recv_closed or inbox is None or event is None or conn.event_shutting_down.is_set():
                raise MuxedStreamEOF("no more data")
            if event.is_set():
                event = conn.stream_events[sid] = trio.Event()
            await event.wait()
            has_waited = True

    async def _give_credit(self, taken: int, has_waited: bool) -> None:
        self._unreturned += taken
        if self.closed or self.recv_closed:
            if self.closed:
                self.conn.forget(self)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        if self._unreturned < self.target_recv_window // 2:
            if not has_waited:  # a reader of a full buffer must not starve others
                await trio.lowlevel.cancel_shielded_checkpoint()
            return
        increment, self._unreturned = self._unreturned, 0
        grow = min(self.target_recv_window, MAX_WINDOW - self.target_recv_window)
        if grow > 0 and self.conn.grant(grow):
            self.target_recv_window += grow
            increment += grow
        self.recv_window += increment
        try:
            with trio.CancelScope(shield=True):
                await self.conn.write_header(TYPE_WINDOW_UPDATE, 0, self.stream_id, increment)
        except Exception as error:  # the bytes read are good all the same
            logger.debug("credit for stream %d: %s", self.stream_id, error)

    async def write(self, data: bytes) -> None:
        """Write all of data (any bytes-like object) as DATA frames, waiting for window credit as need be."""
        view = memoryview(data).cast("B")
        sent = 0
        while sent < len(view):
            while self.send_window <= 0:
                self._check_writable()
                await self._wait_for_window()
            self._check_writable()
            frames: list[bytes] = []
            before = sent
            flags = owed = self.pay()
            while sent < len(view) and self.send_window > 0 and len(frames) < MAX_BATCH:
                size = min(self.send_window, MAX_PAYLOAD, len(view) - sent)
                self.send_window -= size
                header = HEADER.pack(0, TYPE_DATA, flags, self.stream_id, size)
                frames.append(b"".join((header, view[sent : sent + size])))
                sent, flags = sent + size, 0
            try:
                await self.conn._write_frames(frames, is_urgent=self.is_urgent)
            except trio.Cancelled:  # nothing has left
                self.owed = owed
                self.send_window += sent - before
                raise

    def leaves_whole(self, size: int) -> bool:
        """Whether a write of so many bytes leaves whole or not at all, and without waiting for the remote's credit."""
        return size + HEADER.size <= SMALL_BYTES and size <= self.send_window

    def _check_writable(self) -> None:
        if self.send_closed or self.closed:
            raise MuxedStreamError("stream is closed or was reset by the remote")

    async def _wait_for_window(self) -> None:
        self.window_opened = trio.Event()
        with trio.move_on_after(WINDOW_SECONDS) as scope:
            await self.window_opened.wait()
        if scope.cancelled_caught:
            raise MuxedStreamError(f"the remote granted no window for {WINDOW_SECONDS:g} s")

    async def reset(self) -> None:
        """As upstream, and wakes our own reader and writer, and drops what nobody will read."""
        event = self.conn.stream_events.get(self.stream_id)
        self.conn.stream_buffers.get(self.stream_id, Inbox()).clear()
        try:
            await super().reset()
        finally:
            self.window_opened.set()
            if event is not None:
                event.set()
