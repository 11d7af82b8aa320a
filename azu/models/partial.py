"""A blob on its way into the store: verified pieces, in any order, from any number of threads."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from azu.errors import InternalError, TrustError
from azu.models.manifest import Blob
from azu.models.pieces import piece_span

__all__ = ["PartialBlob", "storage_errors", "write_all"]

Buffer = bytes | bytearray | memoryview

# At once: with whole pieces of 4 MiB a file's writing now and then took ten times the time in the kernel (ext4 in Linux
# 6, 24 GiB of memory with most of it free), and never did with this.
_WRITE_BYTES = 1 << 20


class PartialBlob:
    """Made by `LayerStore.incoming`. `missing` holds the indices of the pieces that are not here yet.

    No byte is written before its piece is verified. Still, nothing but the bytes themselves is trusted after a crash:
    a note of which pieces are good could reach the disk before they do. So resuming hashes what is there, at about
    1 GB/s.

    Args:
        digests: the SHA-256 of each piece.
        file: open for reading and writing, its writes unbuffered.
        publish: makes the finished file a blob of the store.
    """

    def __init__(
        self,
        blob: Blob,
        digests: Sequence[bytes],
        file: IO[bytes],
        publish: Callable[[], None],
    ) -> None:
        self.blob = blob
        self.missing = set(range(len(digests)))
        self._digests = digests
        self._descriptor = file.fileno()
        self._publish = publish
        self._lock = threading.Lock()
        self._folder = Path(file.name).parent
        with storage_errors(self._folder):
            self._resume(os.fstat(self._descriptor).st_size)

    @property
    def missing_bytes(self) -> int:
        """The size of what is missing."""
        return sum(piece_span(self.blob.size, index)[1] for index in list(self.missing))

    def write(self, index: int, data: Buffer) -> None:
        """Verifies and writes piece `index`; one that is here may come again.

        Raises:
            TrustError: code "digest_mismatch", where these are not its bytes; none of them was written.
            InternalError: code "storage", where the disk is full.
        """
        if hashlib.sha256(data).digest() != self._digests[index]:
            raise TrustError(
                f"piece {index} of blob {self.blob.digest} has another SHA-256",
                code="digest_mismatch",
                remedy="Fetch it again from another peer.",
            )
        # One writer at a time: the file system lets in no more, and lets the others spin.
        with storage_errors(self._folder), self._lock:
            write_all(self._descriptor, data, piece_span(self.blob.size, index)[0])
            self.missing.discard(index)

    def commit(self) -> None:
        """Makes the blob visible.

        Raises:
            TrustError: code "size_mismatch", where a piece is missing.
            InternalError: code "storage", where the disk is full.
        """
        if self.missing:
            raise TrustError(f"{len(self.missing)} pieces of blob {self.blob.digest} are missing", code="size_mismatch")
        with storage_errors(self._folder):
            os.ftruncate(self._descriptor, self.blob.size)  # the leftover of something else may be longer
            self._publish()

    def _resume(self, present: int) -> None:
        for index in sorted(self.missing):
            offset, length = piece_span(self.blob.size, index)
            if present < offset + length or not length:
                break
            data = os.pread(self._descriptor, length, offset)
            if hashlib.sha256(data).digest() == self._digests[index]:
                self.missing.discard(index)


def write_all(descriptor: int, data: Buffer, offset: int) -> None:
    """Writes all of `data` from `offset` on."""
    view = memoryview(data)
    while view:  # a disk that fills up, or a signal, may stop it in between
        written = os.pwrite(descriptor, view[:_WRITE_BYTES], offset)
        view, offset = view[written:], offset + written


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Maps the errors of a disk to InternalError, code "storage"."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"Free some space under {folder}." if full else f"Check {folder} and its permissions."
        raise InternalError(f"layer store: {error.strerror or error}", code="storage", remedy=remedy) from error
