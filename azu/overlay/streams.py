"""OverlayStream: one authenticated, ordered, flow-controlled byte stream to a peer."""

from __future__ import annotations

import logging
from typing import Any, Self

import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset

from azu.errors import NetworkError
from azu.overlay._link import Buffer
from azu.overlay.faults import acquire, mapped, shielded
from azu.overlay.gate import subnet_of

__all__ = ["CLOSE_SECONDS", "JOIN_BYTES", "WRITE_SECONDS", "OverlayStream"]

logger = logging.getLogger(__name__)

WRITE_SECONDS = 15.0  # one send_all may take this long before its stream is given up
CLOSE_SECONDS = 2.0  # closing never takes longer, even when cancelled
JOIN_BYTES = 65_507  # buffers are joined up to one Yamux frame that fits one Noise message (65519 - 12 bytes)


class OverlayStream:
    """A stream to `peer_id`, whose identity Noise has proven. Whoever opened it closes it with `aclose()`;
    a handler's stream is closed by the overlay when the handler returns. Usable as an async context manager.
    """

    def __init__(self, net_stream: INetStream, peer_id: str, protocol: str) -> None:
        self.peer_id = peer_id
        self.protocol = protocol
        self._net: Any = net_stream
        # Reads and writes go straight to the muxer: NetStream would take a state lock round each of them.
        self._muxed: Any = net_stream.muxed_stream  # type: ignore[attr-defined]  # NetStream has it, the ABC has not
        self._send_lock = trio.Lock()

    @property
    def is_relayed(self) -> bool:
        """Whether it goes through a relay."""
        kind: ConnectionType = self._muxed.conn.get_connection_type()
        return kind != ConnectionType.DIRECT

    @property
    def remote_ip(self) -> str:
        """The address that the peer's packets come from; empty where a relay sends them."""
        endpoint = self._muxed.conn.get_remote_address()
        return endpoint[0] if endpoint else ""

    @property
    def network(self) -> str:
        """The /24, or /48 of IPv6, that the peer's packets come from; empty where a relay sends them."""
        return subnet_of(self.remote_ip) if self.remote_ip else ""

    def hurry(self) -> None:
        """Let what is sent on it overtake large writes of the connection's other streams."""
        self._muxed.is_urgent = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """The next 1..max_bytes bytes, or b"" when no more will come; for the rest see `receive_buffers`."""
        return b"".join(await self.receive_buffers(max_bytes))

    async def receive_buffers(self, max_bytes: int) -> list[Buffer]:
        """The next 1..max_bytes bytes as they came, uncopied; an empty list when no more will come.

        The end means the remote's end of stream, its reset, or its death alike: protocols need an end frame of their
        own. Cancelling is safe: bytes are either returned or stay in the stream.

        Raises:
            NetworkError: any other fault of the connection.
        """
        try:
            data: list[Buffer] = await self._muxed.read_buffers(max_bytes)
            return data
        except (MuxedStreamEOF, MuxedStreamReset):
            return []
        except Exception:  # mapped, or raised as it is
            with mapped(f"read from {self.peer_id}"):
                raise

    async def send_all(self, *buffers: Buffer, timeout: float = WRITE_SECONDS) -> None:
        """Write the buffers in order. Concurrent senders take turns.

        Only the wait for one's turn can be cancelled: what has begun is finished, up to `timeout` seconds. Past
        it the stream is reset, as half a message may have left (where the socket itself is stuck, the muxer
        closes the whole connection).

        Raises:
            NetworkError: the peer went away, reset the stream, or did not read in time.
        """
        chunks = _joined(buffers)
        await acquire(self._send_lock)
        try:
            if len(chunks) == 1 and self._muxed.leaves_whole(len(chunks[0])):
                await self._send_whole(chunks[0])
                return
            with shielded(timeout) as scope, mapped(f"send to {self.peer_id}"):
                for chunk in chunks:
                    await self._muxed.write(chunk)
            if not scope.cancelled_caught:
                return
            await self.reset()
            raise NetworkError(
                f"{self.peer_id} did not read for {timeout:g} s",
                code="write_timeout",
                remedy="The peer is overloaded or cut off; choose another one",
            )
        finally:
            self._send_lock.release()

    async def _send_whole(self, chunk: Buffer) -> None:
        """What needs no shield: scopes take time, and the ring's next step waits for this."""
        try:
            await self._muxed.write(chunk)
        except Exception:  # mapped, or raised as it is
            with mapped(f"send to {self.peer_id}"):
                raise

    async def send_eof(self) -> None:
        """Half-close: the remote reads b"" after what was sent. No error if the remote is gone already."""
        async with self._send_lock:
            with shielded(CLOSE_SECONDS):
                try:
                    await self._net.close_write()
                except Exception as error:  # promised not to raise
                    logger.debug("half-close to %s: %s", self.peer_id, error)

    async def aclose(self) -> None:
        """Close both directions; what was sent is still delivered. Never raises; takes 2 s at most."""
        with shielded(CLOSE_SECONDS):
            try:
                await self._net.close()
                if not self._muxed.recv_closed:
                    await self._net.reset()  # else the stream lives on until the remote closes its side too
            except Exception as error:  # promised not to raise
                logger.debug("close to %s: %s", self.peer_id, error)

    async def reset(self) -> None:
        """Abandon the stream in both directions. Never raises; takes 2 s at most."""
        with shielded(CLOSE_SECONDS):
            try:
                await self._net.reset()
            except Exception as error:  # promised not to raise
                logger.debug("reset to %s: %s", self.peer_id, error)

    def __repr__(self) -> str:
        return f"<OverlayStream {self.protocol} to {self.peer_id}>"


def _joined(buffers: tuple[Buffer, ...]) -> list[Buffer]:
    """Join neighbours that fit one frame together; leave large buffers as they are, uncopied."""
    chunks: list[Buffer] = []
    small: list[Buffer] = []
    size = 0
    for buffer in buffers:
        length = buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
        if size + length > JOIN_BYTES and small:
            chunks.append(small[0] if len(small) == 1 else b"".join(small))
            small, size = [], 0
        small.append(buffer)
        size += length
    if small:
        chunks.append(small[0] if len(small) == 1 else b"".join(small))
    return chunks
