"""One Noise session's messages, several at a time: what the muxer reads and writes through once it is negotiated.

libp2p's own way costs two awaits through five classes and six copies a message. The cipher states, which own keys and
nonces, are the session's; this only moves bytes between them and the connection beneath.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

from libp2p.io.exceptions import ConnectionClosedError

__all__ = ["Buffer", "Inbox", "NoiseLink"]

READ_BYTES = 256 * 1024  # one read of the connection; several Noise messages at once under load
KEPT_BYTES = 32 * 1024  # a slice of so much is kept as it is: the message that it keeps alive is at most twice as long

_LENGTH = struct.Struct(">H")

Buffer = bytes | bytearray | memoryview


class NoiseLink:
    """A secured connection as whole Noise messages. One task reads, and one at a time writes."""

    def __init__(self, session: Any) -> None:  # a SecureSession over Noise: the ABC names nothing of what is needed
        self._session = session
        noise = session.conn
        ciphers = noise.noise_state.noise_protocol
        self._encrypt = ciphers.cipher_state_encrypt.encrypt_with_ad
        self._decrypt = ciphers.cipher_state_decrypt.decrypt_with_ad
        self._raw = noise.read_writer.read_write_closer
        self._carry = b""  # the beginning of a message

    def leftover(self) -> bytes:
        """What arrived together with the end of the negotiation."""
        left: bytes = self._session._drain(None)
        return left

    async def receive(self) -> list[bytes]:
        """The plaintexts of the messages that one read completes; none where they are long.

        Raises:
            ConnectionClosedError: the end. Other errors mean a broken connection, or a forged message.
        """
        data = await self._raw.read(READ_BYTES)
        if not data:
            raise ConnectionClosedError("connection closed")
        messages: list[bytes] = []
        view, at = memoryview(data), 0
        if self._carry:
            at = self._complete(view)
            if at < 0:
                return messages
            messages.append(self._decrypt(b"", memoryview(self._carry)[2:]))
            self._carry = b""
        while len(view) - at >= 2:
            end = at + 2 + _LENGTH.unpack_from(view, at)[0]
            if end > len(view):
                break
            messages.append(self._decrypt(b"", view[at + 2 : end]))
            at = end
        self._carry = bytes(view[at:])
        return messages

    def _complete(self, view: memoryview) -> int:
        """Fill up the message that has begun; return how much of the view that took, or -1 if it was not enough."""
        at = 0
        if len(self._carry) == 1:
            self._carry, at = self._carry + bytes(view[:1]), 1
        wanted = 2 + _LENGTH.unpack_from(self._carry)[0] - len(self._carry)
        self._carry += view[at : at + wanted]
        return at + wanted if at + wanted <= len(view) else -1

    async def send(self, plaintexts: Sequence[bytes]) -> None:
        """Seal each as a message and write them with one call: waiting for the socket costs more than encrypting."""
        parts: list[bytes] = []
        for plaintext in plaintexts:
            sealed = self._encrypt(b"", plaintext)
            parts += (_LENGTH.pack(len(sealed)), sealed)
        await self._raw.write(b"".join(parts))


class Inbox:
    """Bytes of one stream that came and are not read yet.

    Large pieces are kept as the slices of the messages that they came in, uncopied. Small ones are gathered, so that a
    stream of tiny frames takes no more memory than its bytes.
    """

    def __init__(self) -> None:
        self._chunks: deque[bytearray | memoryview] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, data: memoryview) -> None:
        """Append; `data` must stay as it is."""
        self._size += len(data)
        if len(data) >= KEPT_BYTES:
            self._chunks.append(data)
        elif self._chunks and isinstance(self._chunks[-1], bytearray):
            self._chunks[-1] += data
        else:
            self._chunks.append(bytearray(data))

    def take(self, limit: int) -> list[Buffer]:
        """Remove the first 1..limit bytes, which must be there."""
        taken: list[Buffer] = []
        while self._chunks and limit > 0:
            chunk = self._chunks.popleft()
            if len(chunk) > limit:
                view = memoryview(chunk)
                chunk = view[:limit]
                self._chunks.appendleft(view[limit:])
            limit -= len(chunk)
            self._size -= len(chunk)
            taken.append(chunk)
        return taken

    def clear(self) -> None:
        """Drop everything."""
        self._chunks.clear()
        self._size = 0
