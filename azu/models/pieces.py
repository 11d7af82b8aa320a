"""Pieces of a blob: PIECE_BYTES each but for the last, and each with a SHA-256 in the blob's piece list."""

from __future__ import annotations

import hashlib

from azu.errors import ModelError
from azu.models.manifest import PIECE_BYTES, Blob

__all__ = ["PieceHasher", "piece_count", "piece_digests", "piece_span"]


def piece_count(size: int) -> int:
    """Returns how many pieces a blob of `size` bytes has; an empty one is one empty piece."""
    return max(1, -(-size // PIECE_BYTES))


def piece_span(size: int, index: int) -> tuple[int, int]:
    """Returns offset and length in bytes of a piece of a blob of `size` bytes."""
    offset = index * PIECE_BYTES
    return offset, min(PIECE_BYTES, size - offset)


def piece_digests(blob: Blob, piece_list: bytes) -> tuple[bytes, ...]:
    """Returns the SHA-256 of each piece of a blob, 32 bytes each.

    Args:
        piece_list: the content of `blob.piece_list`; not looked at where the blob is a single piece.

    Raises:
        ModelError: code "bad_manifest", where the list has another length than the blob asks for.
    """
    if blob.piece_list is None:
        return (bytes.fromhex(blob.digest),)
    if len(piece_list) != blob.piece_list.size:
        raise ModelError(f"the piece list of blob {blob.digest} has a wrong length", code="bad_manifest")
    return tuple(piece_list[start : start + 32] for start in range(0, len(piece_list), 32))


class PieceHasher:
    """The SHA-256 of a stream, and those of its pieces of PIECE_BYTES."""

    def __init__(self) -> None:
        self.size = 0
        self._whole = hashlib.sha256()
        self._piece = hashlib.sha256()
        self._done = bytearray()  # digests of complete pieces

    def update(self, chunk: bytes | memoryview) -> None:
        """Adds to the end of the stream."""
        view = memoryview(chunk)
        self._whole.update(view)
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
        """The stream's SHA-256, as 64 hex digits."""
        return self._whole.hexdigest()

    @property
    def piece_list(self) -> bytes:
        """The SHA-256s of its pieces so far, 32 bytes each."""
        return bytes(self._done) + (self._piece.digest() if self.size % PIECE_BYTES else b"")
