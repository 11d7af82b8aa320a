"""The layer store: immutable files on disk, named by their SHA-256.

    root/blobs/ab/abcdef...          complete files, read-only; only a verified file ever gets this name
    root/partial/abcdef...           an unfinished download, resumed by hashing it again
    root/partial/abcdef....RANDOM    the same by a second process while the first holds the lock on the plain name

A file becomes visible by one rename after its bytes, then its directory, are on disk; so a crash leaves either nothing
or all of it. Two processes may share a root: they never write the same file, and the second rename of equal bytes is
harmless. Access times (set here, since many systems mount with noatime) order evictions.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from azu.errors import InputError, InternalError, ModelError, TrustError
from azu.models.manifest import PIECE_BYTES, Blob, is_digest

__all__ = ["BlobWriter", "LayerStore", "PieceHasher"]

_CHUNK = 1 << 20  # bytes hashed at a time
_STALE_SECONDS = 86_400.0  # no single blob takes a day to write


class LayerStore:
    """Content-addressed blobs under one directory.

    Args:
        root: created where absent.
        limit_bytes: what `evict` shrinks the store to; None keeps everything.

    Raises:
        InternalError: code "storage", where the directory cannot be made or written, or the disk is full.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self._blobs = root / "blobs"
        self._partial = root / "partial"
        with _storage_errors(root):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def has(self, digest: str) -> bool:
        """Returns whether the complete blob is here."""
        return self._place(digest).is_file()

    def path(self, digest: str) -> Path:
        """Returns where the blob lies, and counts that as a use.

        Raises:
            ModelError: code "missing_blob", where it is not here.
        """
        place = self._place(digest)
        try:
            os.utime(place)
        except FileNotFoundError:
            problem = f"blob {digest} is not in the store"
            raise ModelError(problem, code="missing_blob", remedy="Fetch it first.") from None
        except OSError:
            pass  # a read-only store still serves; only its eviction order suffers
        return place

    def size(self, digest: str) -> int:
        """Returns the blob's length in bytes; raises as `path` does."""
        return self.path(digest).stat().st_size

    def put_bytes(self, data: bytes) -> Blob:
        """Stores `data` whole and returns its blob; storing it again writes nothing."""
        return self.put_chunks([data])

    def put_chunks(self, chunks: Iterable[bytes | memoryview]) -> Blob:
        """Stores the concatenation of `chunks`, whose digest is found on the way; one chunk is in memory at a time.

        A blob of several pieces gets its piece list stored too.
        """
        temporary = self._partial / f"new.{os.getpid()}.{secrets.token_hex(8)}"
        hasher = PieceHasher()
        try:
            with _storage_errors(self.root), temporary.open("xb") as file:
                for chunk in chunks:
                    hasher.update(chunk)
                    file.write(chunk)
                if not self.has(hasher.digest):
                    self._publish(file, temporary, hasher.digest)
        finally:
            temporary.unlink(missing_ok=True)
        pieces = self.put_bytes(hasher.piece_list).digest if hasher.size > PIECE_BYTES else ""
        return Blob(hasher.digest, hasher.size, pieces)

    @contextmanager
    def writer(self, digest: str, size: int) -> Iterator[BlobWriter]:
        """Opens a blob for streaming in; leaving without `commit` keeps what has come for a later resumption.

        Args:
            digest: the SHA-256 that the bytes must have.
            size: their exact number.
        """
        blob = Blob(digest, size)
        with _storage_errors(self.root):
            file, temporary = self._open_partial(digest)
        try:
            writer = BlobWriter(self, blob, file, temporary)
            yield writer
        finally:
            with _storage_errors(self.root):
                file.close()
                self._tidy(temporary, resumable=temporary.name == digest)

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Returns up to `length` bytes from `offset`; fewer at the end.

        Raises:
            InputError: where offset or length is negative.
            ModelError: code "missing_blob".
        """
        if offset < 0 or length < 0:
            raise InputError(f"cannot read {length} bytes at {offset}")
        with _storage_errors(self.root), self.path(digest).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def verify(self, digest: str) -> bool:
        """Hashes the blob again; one that no longer matches (bit rot, tampering) is deleted, and False returned."""
        place = self.path(digest)
        with _storage_errors(self.root), place.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return True
            place.unlink(missing_ok=True)
            return False

    def digests(self) -> set[str]:
        """Returns the digests of all complete blobs."""
        with _storage_errors(self.root):
            return {place.name for place in self._blobs.glob("??/*") if is_digest(place.name)}

    def evict(self, keep: set[str]) -> int:
        """Deletes least recently used blobs outside `keep` until the store fits its limit; returns the bytes freed."""
        if self.limit_bytes is None:
            return 0
        with _storage_errors(self.root):
            stats = list(self._stats())
            excess = sum(stat.st_size for _, stat in stats) - self.limit_bytes
            freed = 0
            for place, stat in sorted(stats, key=lambda item: item[1].st_mtime_ns):
                if freed >= excess:
                    break
                if place.name not in keep:
                    place.unlink(missing_ok=True)
                    freed += stat.st_size
            return freed

    def _stats(self) -> Iterator[tuple[Path, os.stat_result]]:
        for digest in self.digests():
            with suppress(FileNotFoundError):  # another process evicts too
                yield self._place(digest), self._place(digest).stat()

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):  # it becomes a path: nothing but hex may pass
            raise InputError("a blob's digest must be 64 lower-case hex digits", code="bad_digest")
        return self._blobs / digest[:2] / digest

    def _open_partial(self, digest: str) -> tuple[IO[bytes], Path]:
        """Opens the resumable partial under its lock, or a private one where another process holds that."""
        self._place(digest)
        temporary = self._partial / digest
        file = temporary.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have renamed or deleted what we have just opened.
            if os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                return file, temporary
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        private = self._partial / f"{digest}.{secrets.token_hex(8)}"
        return private.open("x+b"), private

    def _tidy(self, temporary: Path, *, resumable: bool) -> None:
        """Deletes what nobody would resume; a committed file is no longer there."""
        with suppress(FileNotFoundError):
            if not resumable or not temporary.stat().st_size:
                temporary.unlink()

    def _sweep(self) -> None:
        """Deletes what crashed processes left under unique names."""
        oldest = time.time() - _STALE_SECONDS
        for place in self._partial.glob("*.*"):
            with suppress(FileNotFoundError):
                if place.stat().st_mtime < oldest:
                    place.unlink()

    def _publish(self, file: IO[bytes], temporary: Path, digest: str) -> None:
        """Makes a written, verified temporary file the blob `digest`."""
        place = self._place(digest)
        file.flush()
        os.fsync(file.fileno())
        place.parent.mkdir(exist_ok=True)
        temporary.chmod(0o444)
        temporary.replace(place)
        _sync_directory(place.parent)


class BlobWriter:
    """Streams one blob into the store; made by `LayerStore.writer`. One owner at a time.

    `offset` says how many bytes are here already: continue from there.
    """

    def __init__(self, store: LayerStore, blob: Blob, file: IO[bytes], temporary: Path) -> None:
        self._store = store
        self._blob = blob
        self._file = file
        self._temporary = temporary
        self._hasher = hashlib.sha256()
        self.offset = 0
        with _storage_errors(store.root):
            self._resume()

    def write(self, chunk: bytes | memoryview) -> None:
        """Appends a chunk.

        Raises:
            TrustError: code "size_mismatch", where it would exceed the blob's size; the partial is deleted.
            InternalError: code "storage", where the disk is full; what was written before stays.
        """
        if self.offset + len(chunk) > self._blob.size:
            raise self._discard("size_mismatch", f"more than {self._blob.size} bytes came")
        with _storage_errors(self._store.root):
            self._file.write(chunk)
        self._hasher.update(chunk)
        self.offset += len(chunk)

    def commit(self) -> Blob:
        """Verifies size and digest, makes the blob visible, and returns it.

        Raises:
            TrustError: code "size_mismatch" (too short; the partial stays) or "digest_mismatch" (it is deleted).
        """
        if self.offset != self._blob.size:
            raise self._refused("size_mismatch", f"{self.offset} of {self._blob.size} bytes came")
        if self._hasher.hexdigest() != self._blob.digest:
            raise self._discard("digest_mismatch", "its bytes have another SHA-256")
        with _storage_errors(self._store.root):
            self._store._publish(self._file, self._temporary, self._blob.digest)
        return self._blob

    def _resume(self) -> None:
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            self._hasher.update(chunk)
            self.offset += len(chunk)
        if self.offset > self._blob.size:  # a leftover that cannot be a prefix
            self._file.truncate(0)
            self._hasher = hashlib.sha256()
            self.offset = 0

    def _discard(self, code: str, problem: str) -> TrustError:
        self._temporary.unlink(missing_ok=True)
        return self._refused(code, problem)

    def _refused(self, code: str, problem: str) -> TrustError:
        remedy = "Fetch it again from another peer."
        return TrustError(f"blob {self._blob.digest} is refused: {problem}", code=code, remedy=remedy)


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


@contextmanager
def _storage_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"Free some space under {root}." if full else f"Check {root} and its permissions."
        raise InternalError(f"layer store: {error.strerror or error}", code="storage", remedy=remedy) from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
