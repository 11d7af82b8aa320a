"""A private swarm's key beneath everything: who has not got it cannot connect, and sees nothing but random bytes.

Each direction begins with a nonce of 24 random bytes; all that follows is XORed with the XSalsa20 stream of key and
nonce. It keeps strangers out and no more: authenticity and forward secrecy come from Noise above it. As in go-libp2p
and js-libp2p it lies in the upgrader, so that relayed and hole-punched connections have it as well.

py-libp2p 0.8.1 has something of the name (`security/pnet`), with Salsa20 and a nonce of 8 bytes: it does not
understand other implementations.

Sources: https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md; D. J. Bernstein, "Extending the
Salsa20 nonce" (2011), section 2.
"""

from __future__ import annotations

import logging
import os
import struct
from typing import Any

import trio
from Crypto.Cipher import Salsa20
from Crypto.Cipher.Salsa20 import Salsa20Cipher
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TMuxerOptions, TSecurityOptions
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectError
from libp2p.transport.exceptions import SecurityUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from azu.errors import InputError
from azu.logs import log
from azu.overlay.faults import reason
from azu.swarm_key import KEY_BYTES

__all__ = ["NONCE_BYTES", "KeyedUpgrader", "ProtectedConnection", "SwarmKeyError", "hsalsa20", "xsalsa20"]

logger = logging.getLogger(__name__)

NONCE_BYTES = 24
# What every libp2p peer sends first, to negotiate what secures the connection (multistream-select 1.0).
_GREETING = b"\x13/multistream/1.0.0\n"
_WARN_SECONDS = 60.0  # between two warnings of strangers: anybody can cause them
_OTHER_KEY = "the peer has another swarm key, or none"

_WORDS = struct.Struct("<16I")
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
# One double round of Salsa20: indices of four words to mix, columns first, then rows.
_QUARTERS = (
    (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14),
)  # fmt: skip


class SwarmKeyError(IOException):
    """The other end has not got our swarm key."""


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """A key of 32 bytes out of one of 32 and a nonce of 16."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    words = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _ in range(10):
        for a, b, c, d in _QUARTERS:
            words[b] ^= _rotated(words[a] + words[d], 7)
            words[c] ^= _rotated(words[b] + words[a], 9)
            words[d] ^= _rotated(words[c] + words[b], 13)
            words[a] ^= _rotated(words[d] + words[c], 18)
    return struct.pack("<8I", *(words[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def _rotated(word: int, by: int) -> int:
    word &= 0xFFFFFFFF
    return (word << by | word >> (32 - by)) & 0xFFFFFFFF


def xsalsa20(key: bytes, nonce: bytes) -> Salsa20Cipher:
    """The stream cipher of a 32-byte key and a 24-byte nonce, from its beginning."""
    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


class ProtectedConnection(IRawConnection):
    """A raw connection through the swarm key. One task reads, and one at a time writes.

    A write that is cancelled leaves the stream broken, as it does on Noise.
    """

    def __init__(self, connection: IRawConnection, key: bytes) -> None:
        self._connection = connection
        self._key = key
        nonce = os.urandom(NONCE_BYTES)
        self._hello: bytes = nonce
        self._encrypt = xsalsa20(key, nonce).encrypt
        self._reader: Salsa20Cipher | None = None
        self._greeting = _GREETING  # as much as we still wait for
        self.is_initiator = connection.is_initiator

    async def greet(self) -> None:
        """Send the nonce. At once, since js-libp2p says nothing before it has ours."""
        hello, self._hello = self._hello, b""
        await self._connection.write(hello)

    async def write(self, data: bytes) -> None:
        """All of data."""
        await self._connection.write(self._encrypt(data))

    async def read(self, n: int | None = None) -> bytes:
        """Up to n bytes.

        Raises:
            SwarmKeyError: what comes cannot be the beginning of a libp2p connection with our key.
        """
        if self._reader is None:
            self._reader = xsalsa20(self._key, await self._read_nonce())
        if not self._greeting:
            return self._reader.decrypt(await self._connection.read(n))
        data = self._reader.decrypt(await self._read_early(n))
        if not self._greeting.startswith(data[: len(self._greeting)]):
            raise SwarmKeyError(_OTHER_KEY)
        self._greeting = self._greeting[len(data) :]
        return data

    async def _read_nonce(self) -> bytes:
        nonce = b""
        while len(nonce) < NONCE_BYTES:
            nonce += await self._read_early(NONCE_BYTES - len(nonce))
            if nonce[: len(_GREETING)] == _GREETING:  # in the clear; it waits for ours, which will never come
                raise SwarmKeyError("the peer has no swarm key")
        return nonce

    async def _read_early(self, n: int | None) -> bytes:
        """Whoever finds out first that the keys differ hangs up."""
        try:
            data = await self._connection.read(n)
        except ConnectionClosedError as error:
            raise SwarmKeyError(f"the peer hung up at once: {_OTHER_KEY}") from error
        if not data and n != 0:
            raise SwarmKeyError(f"the peer hung up at once: {_OTHER_KEY}")
        return data

    async def close(self) -> None:
        """As the connection beneath."""
        await self._connection.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """As the connection beneath."""
        return self._connection.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """As the connection beneath."""
        return self._connection.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """As the connection beneath."""
        return self._connection.get_connection_type()


class KeyedUpgrader(TransportUpgrader):
    """Upstream's upgrader with a swarm key, or with none.

    Every raw connection comes through here before anything is said on it: dialled, accepted, punched or relayed.
    """

    def __init__(self, security: TSecurityOptions, muxers: TMuxerOptions, swarm_key: bytes | None) -> None:
        if swarm_key is not None and len(swarm_key) != KEY_BYTES:
            raise InputError(f"a swarm key has {KEY_BYTES} bytes, not {len(swarm_key)}", code="bad_swarm_key")
        super().__init__(security, muxers)
        self._key = swarm_key
        self._warn_again = 0.0

    async def upgrade_security(
        self, raw_conn: IRawConnection, is_initiator: bool, peer_id: ID | None = None
    ) -> ISecureConn:
        """As upstream, beneath it the swarm key."""
        if self._key is None:
            return await self._unkeyed(raw_conn, is_initiator, peer_id)
        protected = ProtectedConnection(raw_conn, self._key)
        await protected.greet()
        try:
            return await super().upgrade_security(protected, is_initiator, peer_id)
        except SecurityUpgradeFailure as error:
            self._warn(raw_conn, error)
            raise

    async def _unkeyed(self, raw_conn: IRawConnection, is_initiator: bool, peer_id: ID | None) -> ISecureConn:
        try:
            return await super().upgrade_security(raw_conn, is_initiator, peer_id)
        except (SecurityUpgradeFailure, UnicodeDecodeError) as error:
            if isinstance(error, SecurityUpgradeFailure) and not isinstance(
                error.__cause__, MultiselectError | MultiselectClientError
            ):
                raise
            raise SecurityUpgradeFailure(
                f"the peer speaks no libp2p ({reason(error)}), or its swarm is private: that needs --swarm-key"
            ) from None

    def _warn(self, raw_conn: IRawConnection, error: BaseException) -> None:
        """Tell the operator whose member cannot get in; its own message says the same."""
        cause: Any = error
        while cause is not None and not isinstance(cause, SwarmKeyError):
            cause = cause.__cause__
        if cause is None or raw_conn.is_initiator or trio.current_time() < self._warn_again:
            return
        self._warn_again = trio.current_time() + _WARN_SECONDS
        address = raw_conn.get_remote_address()
        log(logger, logging.WARNING, "turned away: no or another swarm key", ip=address[0] if address else "")
