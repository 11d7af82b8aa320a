"""Yamux with py-libp2p's frame loop replaced.

py-libp2p 0.8.1's loop is correct enough for chat and too slow and too trusting for tensors. What differs, and why:

- A frame is written whole or the connection ends: a cancelled task cannot leave half a frame (trap 2), libp2p's own
  queries with their timeouts included.
- A peer that sends beyond its receive window is cut off; upstream only warns, so its bytes could fill our memory.
- A writer waits for window credit on an event (upstream polls every 10 ms) and gives up after `WINDOW_SECONDS`
  (upstream: 5, trap 3).
- Credit is returned when half a window has been read, not after each read (upstream sends one more encrypted
  frame per read), and cancelling a read cannot lose bytes (upstream awaits after taking them).
- A DATA frame with its header fits one Noise message (upstream's 64 KiB frames need two), incoming bytes are parsed
  straight from decrypted messages and stay in them until they are read, frames that wait go out with one socket call,
  and no debug text is formatted per frame.
- A stream's SYN and ACK travel in its first frame, as with rust-yamux; upstream writes two more frames per stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio
from libp2p.abc import ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    FLAG_ACK,
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    HEADER_SIZE,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    Yamux,
    YamuxStream,
)

from azu.overlay._link import Inbox, NoiseLink
from azu.overlay._outbox import Outbox
from azu.overlay._yamux_stream import BATCH_BYTES, HEADER, AzuYamuxStream
from azu.overlay.faults import shielded
from azu.overlay.held import Held

__all__ = ["BATCH_BYTES", "AzuYamux"]

logger = logging.getLogger(__name__)

EXTRA_WINDOWS = 32 * 1024 * 1024  # bytes of window beyond the 256 KiB per stream that one connection is granted
MAX_REMOTE_STREAMS = 512  # streams one connection's remote may have open
MAX_CONTROL = 1024  # pongs and acks in flight; a peer that makes us owe more is cut off
CLOSE_SECONDS = 1.0  # closing the socket
FRAME_SECONDS = 15.0  # a socket that does not take a frame for so long loses the connection


class _Violation(Exception):
    """The remote broke Yamux; its connection ends."""


class AzuYamux(Yamux):
    """One connection's muxer; see the module's docstring for what differs from upstream."""

    streams: dict[int, AzuYamuxStream]  # type: ignore[assignment]  # narrowed: we alone create them
    stream_buffers: dict[int, Inbox]  # type: ignore[assignment]  # upstream asks for their length only

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        is_initiator: bool,
        link: NoiseLink | None = None,
        *,
        held: Held | None = None,
        on_violation: Callable[[str], None] = lambda peer_id: None,
    ) -> None:
        super().__init__(conn, peer_id, is_initiator)
        self._held = Held() if held is None else held
        self._held.watch(self)
        self._on_violation = on_violation
        self._link = NoiseLink(conn) if link is None else link
        self._outbox = Outbox(self._send_frames)
        # Upstream's 10 would make the frame loop wait for acceptance; ours refuses with RST beyond the bound.
        self.new_stream_send_channel, self.new_stream_receive_channel = trio.open_memory_channel[YamuxStream](
            MAX_REMOTE_STREAMS
        )
        self.used_at = trio.current_time()  # when a stream began or ended last
        self._granted = 0
        self._control = 0
        self._payload_left = 0  # bytes of the current DATA frame still to come
        self._payload_stream: AzuYamuxStream | None = None
        self._payload_flags = 0

    @property
    def unread(self) -> int:
        """Bytes that came and are held until somebody reads them."""
        return sum(map(len, self.stream_buffers.values()))

    def cut_off(self, why: str) -> None:
        """Drop what is unread, and close the connection from a task of its own."""
        logger.warning("connection to %s closed: %s", self.peer_id, why)
        for each in self.stream_buffers.values():
            each.clear()
        if self._nursery is not None:
            self._nursery.start_soon(self.secured_conn.close)  # the frame loop sees it and cleans up

    def grant(self, size: int) -> bool:
        """Reserve window beyond the default; False once the connection's share is used up."""
        if self._granted + size > EXTRA_WINDOWS:
            return False
        self._granted += size
        return True

    def forget(self, stream: AzuYamuxStream) -> None:
        """Drop a fully closed stream, unless bytes wait to be read, and take its window back."""
        self._finalize_stream_locked(stream, fully_closed=True)

    def _finalize_stream_locked(self, stream: YamuxStream, *, fully_closed: bool) -> None:
        super()._finalize_stream_locked(stream, fully_closed=fully_closed)
        if fully_closed:
            self.used_at = trio.current_time()
            self._granted -= stream.target_recv_window - DEFAULT_WINDOW_SIZE
            stream.target_recv_window = DEFAULT_WINDOW_SIZE

    async def open_stream(self) -> YamuxStream:
        """Open a stream, of which the remote hears with its first frame (waits while 256 of ours are open)."""
        await self.stream_backlog_semaphore.acquire()
        if self.event_shutting_down.is_set():
            self.stream_backlog_semaphore.release()
            raise MuxedStreamError("connection is shutting down")
        stream = self._add(self.next_stream_id, is_initiator=True)
        self.next_stream_id += 2
        stream._owns_backlog_slot = True
        return stream

    def _add(self, stream_id: int, *, is_initiator: bool) -> AzuYamuxStream:
        self.used_at = trio.current_time()
        stream = AzuYamuxStream(stream_id, self, is_initiator)
        self.streams[stream_id] = stream
        self.stream_buffers[stream_id] = Inbox()
        self.stream_events[stream_id] = trio.Event()
        return stream

    async def write_header(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Write a frame without payload."""
        await self._write_frame(HEADER.pack(0, kind, flags, stream_id, length))

    async def _write_frame(self, data: bytes) -> None:
        """What upstream writes its own frames with (FIN, RST, GO_AWAY): under its name, or theirs are cut."""
        _, kind, flags, stream_id, length = HEADER.unpack(data)
        stream = self.streams.get(stream_id)
        if stream is not None and stream.owed:
            if flags & FLAG_RST and stream.owed & FLAG_SYN:
                return  # the remote has not heard of it
            data = HEADER.pack(0, kind, flags | stream.pay(), stream_id, length)
        await self._write_frames([data])

    async def _write_frames(self, frames: Sequence[bytes], *, is_urgent: bool = False) -> None:
        """Write frames whole, or close the connection. Only the wait for one's turn can be cancelled."""
        await self._outbox.write(frames, is_urgent=is_urgent)

    async def _send_frames(self, frames: Sequence[bytes]) -> None:
        with shielded(FRAME_SECONDS) as scope:
            await self._link.send(frames)
        if scope.cancelled_caught:
            logger.debug("%s takes no bytes: connection closed", self.peer_id)
            with trio.CancelScope(shield=True):
                await self.secured_conn.close()  # the frame loop sees it and cleans up
            raise ConnectionClosedError(f"the connection took no bytes for {FRAME_SECONDS:g} s")

    async def start(self) -> None:
        """Run the connection; its socket is closed when this ends, however it ends (upstream leaks it on cancel)."""
        try:
            await super().start()
        finally:
            self.event_shutting_down.set()
            self.event_closed.set()
            self.event_started.set()  # else whoever waits for the start of one that died at once waits for ever
            with shielded(CLOSE_SECONDS):
                await self.secured_conn.close()

    async def handle_incoming(self) -> None:
        """Read decrypted messages and act on their frames until the connection ends."""
        try:
            carry = self._feed(self._link.leftover())
            while not self.event_shutting_down.is_set():
                for message in await self._link.receive():
                    carry = self._feed(carry + message if carry else message)
        except _Violation as error:
            logger.warning("connection to %s closed: %s", self.peer_id, error)
            self._on_violation(str(self.peer_id))
        except Exception as error:  # a connection ends in many ways: EOF, reset, failed decryption
            logger.debug("connection to %s ended: %r", self.peer_id, error)
        await self._cleanup_on_error()

    async def _cleanup_on_error(self) -> None:
        for stream in self.streams.values():
            stream.closed = True
            stream.window_opened.set()
        await super()._cleanup_on_error()

    def _feed(self, data: bytes) -> bytes:
        """Act on all frames in data; return the beginning of an incomplete header."""
        view, at = memoryview(data), 0
        while True:
            if self._payload_left:
                size = min(self._payload_left, len(view) - at)
                self._on_payload(view[at : at + size])
                at += size
                if self._payload_left:
                    return b""
            if len(view) - at < HEADER_SIZE:
                return bytes(view[at:])
            version, kind, flags, stream_id, length = HEADER.unpack_from(view, at)
            at += HEADER_SIZE
            if version != 0:
                raise _Violation(f"Yamux version {version}")
            self._on_header(kind, flags, stream_id, length)

    def _on_header(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if kind in (TYPE_DATA, TYPE_WINDOW_UPDATE):
            stream = self._accept(stream_id) if flags & FLAG_SYN else self.streams.get(stream_id)
            if kind == TYPE_DATA and length:
                self._payload_left, self._payload_stream, self._payload_flags = length, stream, flags
                if stream is not None:
                    stream.recv_window -= length
                    if stream.recv_window < 0:
                        raise _Violation(f"{-stream.recv_window} bytes beyond the receive window")
                return
            if stream is not None:
                if kind == TYPE_WINDOW_UPDATE and length:
                    stream.send_window += length
                    stream.window_opened.set()
                self._on_flags(stream, flags)
        elif kind == TYPE_PING:
            if flags & FLAG_SYN:
                self._reply(TYPE_PING, FLAG_ACK, 0, length)
            elif flags & FLAG_ACK:
                self._on_pong()
        elif kind == TYPE_GO_AWAY:
            raise ConnectionClosedError(f"go away, code {length}")
        else:
            raise _Violation(f"Yamux frame type {kind}")

    def _on_payload(self, data: memoryview) -> None:
        self._payload_left -= len(data)
        stream = self._payload_stream
        if stream is None:
            return
        inbox, event = self.stream_buffers.get(stream.stream_id), self.stream_events.get(stream.stream_id)
        if inbox is not None and not stream.recv_closed:
            inbox.add(data)
            self._held.came(len(data))
            if event is not None:
                event.set()
        if not self._payload_left:
            self._payload_stream = None
            self._on_flags(stream, self._payload_flags)

    def _on_flags(self, stream: AzuYamuxStream, flags: int) -> None:
        if not flags & (FLAG_FIN | FLAG_RST):
            return
        if flags & FLAG_FIN:
            stream.recv_closed = True
            stream.closed = stream.closed or stream.send_closed
        if flags & FLAG_RST:
            stream.closed = stream.recv_closed = stream.send_closed = stream.reset_received = True
        event = self.stream_events.get(stream.stream_id)
        if event is not None:
            event.set()
        stream.window_opened.set()
        if stream.closed:
            self.forget(stream)

    def _on_pong(self) -> None:
        sample = trio.current_time() - self._ping_sent_time
        self._rtt = sample if self._rtt == 0.0 else (self._rtt + sample) / 2
        self._ping_event.set()

    def _accept(self, stream_id: int) -> AzuYamuxStream | None:
        if stream_id in self.streams or stream_id % 2 == self.next_stream_id % 2 or stream_id == 0:
            raise _Violation(f"SYN for stream {stream_id}")
        stream = self._add(stream_id, is_initiator=False)
        try:
            if len(self.streams) > 2 * MAX_REMOTE_STREAMS:
                raise trio.WouldBlock
            self.new_stream_send_channel.send_nowait(stream)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            stream.closed = True
            self.forget(stream)
            self._reply(TYPE_WINDOW_UPDATE, FLAG_RST, stream_id, 0)
            return None
        return stream

    def _reply(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Write from a task of its own: a frame loop that waits to write while its remote's does deadlocks."""
        self._control += 1
        if self._control > MAX_CONTROL:
            raise _Violation("more pings and new streams than it reads answers to")
        if self._nursery is not None:
            self._nursery.start_soon(self._reply_task, kind, flags, stream_id, length)

    async def _reply_task(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        try:
            await self.write_header(kind, flags, stream_id, length)
        except Exception as error:  # the frame loop sees the end of the connection itself
            logger.debug("reply to %s: %s", self.peer_id, error)
        finally:
            self._control -= 1
