"""Pieces of a blob: PIECE_BYTES each but for the last, and each with a SHA-256 in the blob's piece list.

A blob of one piece has that piece's SHA-256 for its digest. The digest of a larger one is a hash of its piece list, as
in BitTorrent v2 (BEP 52), so that whoever has verified the pieces need not hash the whole again, and a list that gives
the right digest is the right list.
"""

from __future__ import annotations

import hashlib

from azu.errors import ModelError
from azu.models.manifest import PIECE_BYTES, Blob

__all__ = ["PieceHasher", "blob_digest", "piece_count", "piece_digests", "piece_span"]


def piece_count(size: int) -> int:
    """Returns how many pieces a blob of `size` bytes has; an empty one is one empty piece."""
    return max(1, -(-size // PIECE_BYTES))


def piece_span(size: int, index: int) -> tuple[int, int]:
    """Returns offset and length in bytes of a piece of a blob of `size` bytes."""
    offset = index * PIECE_BYTES
    return offset, min(PIECE_BYTES, size - offset)


def blob_digest(size: int, piece_list: bytes) -> str:
    """Returns the digest of a blob of `size` bytes whose pieces have these SHA-256s, as 64 hex digits."""
    if size <= PIECE_BYTES:
        return piece_list.hex()
    # Another hash function than a single piece's, or a small file could be made that has a large one's digest.
    return hashlib.sha512(size.to_bytes(8) + piece_list).digest()[:32].hex()


def piece_digests(blob: Blob, piece_list: bytes) -> tuple[bytes, ...]:
    """Returns the SHA-256 of each piece of a blob, 32 bytes each.

    Args:
        piece_list: the content of `blob.piece_list`; not looked at where the blob is a single piece.

    Raises:
        ModelError: code "bad_manifest", where the list is not this blob's.
    """
    if blob.piece_list is None:
        return (bytes.fromhex(blob.digest),)
    if len(piece_list) != blob.piece_list.size or blob_digest(blob.size, piece_list) != blob.digest:
        raise ModelError(
            f"the piece list of blob {blob.digest} belongs to other bytes",
            code="bad_manifest",
            remedy="The model has to be published again.",
        )
    return tuple(piece_list[start : start + 32] for start in range(0, len(piece_list), 32))


class PieceHasher:
    """Hashes a stream as a blob: piece by piece."""

    def __init__(self) -> None:
        self.size = 0
        self._piece = hashlib.sha256()
        self._done = bytearray()  # digests of complete pieces

    def update(self, chunk: bytes | memoryview) -> None:
        """Adds to the end of the stream."""
        view = memoryview(chunk)
        while view.nbytes:
            part = view[: PIECE_BYTES - self.size % PIECE_BYTES]
            self._piece.update(part)
            self.size += part.nbytes
            view = view[part.nbytes :]
            if self.size % PIECE_BYTES == 0:
                self._done += self._piece.digest()
                self._piece = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The digest of a blob of these bytes, as 64 hex digits."""
        return blob_digest(self.size, self.piece_list or self._piece.digest())

    @property
    def piece_list(self) -> bytes:
        """The SHA-256s of its pieces so far, 32 bytes each."""
        return bytes(self._done) + (self._piece.digest() if self.size % PIECE_BYTES else b"")
