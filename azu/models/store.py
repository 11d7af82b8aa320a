"""The layer store: immutable files on disk, named by their digest (azu.models.pieces).

    root/blobs/ab/abcdef...          complete files, read-only; only a verified file ever gets this name
    root/partial/abcdef...           an unfinished download, resumed by hashing its pieces again
    root/partial/abcdef....RANDOM    the same by a second process while the first holds the lock on the plain name

A file becomes visible by one rename after its bytes, then its directory, are on disk; so a crash leaves either nothing
or all of it. Two processes may share a root: they never write the same file, and the second rename of equal bytes is
harmless. Access times (set here, since many systems mount with noatime) order evictions.

Disks exist that lie about having synced. After a power loss a file may then be cut, zeroed or torn under its final
name, and a note that it was good would be no safer than the file. So `check` hashes each blob once in the life of a
process, before it is first sent or loaded, at 1 to 2 GB/s; the load that follows finds it in the page cache.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

from azu.durable import make_folder, replace_synced
from azu.errors import CapacityError, InputError, ModelError, TrustError
from azu.models.disk import check_space
from azu.models.manifest import PIECE_BYTES, Blob, is_digest
from azu.models.partial import PartialBlob, storage_errors, write_all
from azu.models.pieces import PieceHasher
from azu.sizes import format_size

__all__ = ["LayerStore"]

_STALE_SECONDS = 60.0  # between the making of a file and its lock
_SPARE_BYTES = 256 << 20  # of the disk, left to everything else
_SMALL_BYTES = 1 << 20  # configs, tokenizers, piece lists: evicted last, since that frees next to nothing

Stamp = tuple[int, int, int]  # inode, size, time of the last change of the content


class LayerStore:
    """Content-addressed blobs under one directory; safe with several threads and processes.

    Args:
        root: created where absent.
        limit_bytes: what `make_room` keeps the store within; None lets it grow as long as the disk has room.

    Raises:
        InternalError: code "storage", where the directory cannot be made or written, or the disk is full.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self._blobs = root / "blobs"
        self._partial = root / "partial"
        self._checked: dict[str, Stamp] = {}
        self._checking: dict[str, threading.Lock] = {}
        with storage_errors(root):
            make_folder(self._blobs)
            make_folder(self._partial)
            self._sweep()

    def has(self, digest: str) -> bool:
        """Returns whether there is a blob of that name; `check` says whether it is what it should be."""
        return self._place(digest).is_file()

    def path(self, digest: str) -> Path:
        """Returns where the blob lies, and counts that as a use.

        Raises:
            ModelError: code "missing_blob", where it is not here.
        """
        place = self._place(digest)
        try:
            os.utime(place, ns=(time.time_ns(), place.stat().st_mtime_ns))
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

    def put_chunks(self, chunks: Iterable[bytes | memoryview], *, expected: Blob | None = None) -> Blob:
        """Stores the concatenation of `chunks`, whose digest is found on the way; one chunk is in memory at a time.

        A blob of several pieces gets its piece list stored too.

        Args:
            expected: what it has to be.

        Raises:
            TrustError: code "digest_mismatch" or "size_mismatch", where it is not `expected`; nothing is stored.
        """
        temporary = self._partial / f"new.{os.getpid()}.{secrets.token_hex(8)}"
        hasher = PieceHasher()
        try:
            with storage_errors(self.root), temporary.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # it is no crash's leftover
                for chunk in chunks:
                    hasher.update(chunk)
                    if expected is not None and hasher.size > expected.size:
                        break
                    file.write(chunk)
                if expected is not None and (hasher.size, hasher.digest) != (expected.size, expected.digest):
                    raise _unexpected(expected, hasher.size)
                if not self.has(hasher.digest):
                    self._publish(file, temporary, hasher.digest)
        finally:
            temporary.unlink(missing_ok=True)
        return self._with_pieces(hasher)

    def put_resumed(self, blob: Blob, chunks_from: Callable[[int], Iterable[bytes]]) -> Blob:
        """Stores a blob whose pieces are not known yet, from where an earlier attempt or a killed process stopped.

        Its piece list is stored with it. What is left of it is hashed again; where all of it together turns out not to
        be `blob`, none of it is kept.

        Args:
            chunks_from: yields its bytes from an offset on, in order.

        Raises:
            TrustError: code "digest_mismatch" or "size_mismatch", where it is not `blob`.
        """
        with storage_errors(self.root):
            file, temporary = self._open_partial(blob.digest)
        hasher = PieceHasher()
        try:
            with storage_errors(self.root):
                while hasher.size < blob.size and (left := file.read(min(PIECE_BYTES, blob.size - hasher.size))):
                    hasher.update(left)
                file.truncate(hasher.size)
            for chunk in chunks_from(hasher.size):
                if hasher.size + len(chunk) > blob.size:
                    raise _unexpected(blob, hasher.size + len(chunk))
                with storage_errors(self.root):
                    write_all(file.fileno(), chunk, hasher.size)
                hasher.update(chunk)
            if (hasher.size, hasher.digest) != (blob.size, blob.digest):
                raise _unexpected(blob, hasher.size)
            with storage_errors(self.root):
                self._publish(file, temporary, blob.digest)
        except TrustError:
            file.truncate(0)
            raise
        finally:
            with storage_errors(self.root), file:
                self._tidy(file, temporary, resumable=temporary.name == blob.digest and not self.has(blob.digest))
        return self._with_pieces(hasher)

    @contextmanager
    def incoming(self, blob: Blob, digests: Sequence[bytes]) -> Iterator[PartialBlob]:
        """Opens a blob for its pieces; leaving without `commit` keeps what has come for a later resumption.

        Hashes what is there already. Several threads may write pieces at once.

        Args:
            digests: the SHA-256 of each piece (`piece_digests`).
        """
        with storage_errors(self.root):
            file, temporary = self._open_partial(blob.digest)
        try:
            yield PartialBlob(blob, digests, file, partial(self._publish, file, temporary, blob.digest))
        finally:
            with storage_errors(self.root), file:
                self._tidy(file, temporary, resumable=temporary.name == blob.digest and not self.has(blob.digest))

    def _with_pieces(self, hasher: PieceHasher) -> Blob:
        """The blob that was stored, and its piece list stored too."""
        pieces = self.put_bytes(hasher.piece_list).digest if hasher.size > PIECE_BYTES else ""
        return Blob(hasher.digest, hasher.size, pieces)

    def has_unfinished(self, digest: str) -> bool:
        """Returns whether an earlier download of this blob has left something to resume."""
        self._place(digest)
        return (self._partial / digest).is_file()

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Returns up to `length` bytes from `offset`; fewer at the end. Raises as `read_into` does."""
        if length < 0:
            raise InputError(f"cannot read {length} bytes")
        buffer = bytearray(length)
        return bytes(memoryview(buffer)[: self.read_into(digest, offset, buffer)])

    def read_into(self, digest: str, offset: int, buffer: bytearray | memoryview) -> int:
        """Fills `buffer` with the bytes from `offset`, and returns how many those were; fewer at the end.

        Raises:
            InputError: where the offset is negative.
            ModelError: code "missing_blob".
        """
        if offset < 0:
            raise InputError(f"cannot read from {offset}")
        with storage_errors(self.root):
            try:
                with self.path(digest).open("rb", buffering=0) as file:
                    return os.preadv(file.fileno(), [buffer], offset)
            except FileNotFoundError:  # evicted between the two
                raise ModelError(f"blob {digest} is not in the store", code="missing_blob") from None

    def check(self, digest: str) -> bool:
        """Returns whether the blob is here and has the right bytes; a wrong one is deleted.

        Hashes it the first time, and again only where the file was changed since.
        """
        place = self._place(digest)
        if not place.is_file():  # strangers ask for what they like: only what is here gets a lock
            return False
        with self._checking.setdefault(digest, threading.Lock()):  # whoever asks meanwhile need not hash it too
            try:
                if self._checked.get(digest) == _stamp(place.stat()):
                    return True
                return self.verify(digest)
            except (FileNotFoundError, ModelError):
                return False

    def verify(self, digest: str) -> bool:
        """Hashes the blob again; one that no longer matches (bit rot, tampering) is deleted, and False returned."""
        place = self.path(digest)
        with storage_errors(self.root), place.open("rb", buffering=0) as file:
            stamp = _stamp(os.fstat(file.fileno()))
            hasher = PieceHasher()
            while chunk := file.read(PIECE_BYTES):  # large: each call waits for the interpreter's lock
                hasher.update(chunk)
            if hasher.digest == digest:
                self._checked[digest] = stamp
                return True
            self._checked.pop(digest, None)
            place.unlink(missing_ok=True)
            return False

    def digests(self) -> set[str]:
        """Returns the digests of all complete blobs."""
        with storage_errors(self.root):
            return {place.name for place in self._blobs.glob("??/*") if is_digest(place.name)}

    def make_room(self, wanted: Iterable[Blob], keep: Collection[str] = ()) -> int:
        """Deletes least recently used blobs, and unfinished ones, until those `wanted` that are not here will fit.

        Whoever has a deleted file open or mapped keeps it: its space is free when they let go of it.

        Args:
            keep: digests that stay, besides the wanted ones'.

        Returns:
            the bytes freed.

        Raises:
            CapacityError: code "cache_limit", where the limit is too small for what is wanted and kept.
            InternalError: code "storage", where the disk is.
        """
        with storage_errors(self.root):
            by_digest = {blob.digest: blob for blob in wanted}
            missing = sum(self._missing_bytes(blob) for blob in by_digest.values())
            stats = list(self._stats())
            used = sum(_allocated(stat) for _, stat in stats)
            excess = missing + _SPARE_BYTES - shutil.disk_usage(self.root).free
            if self.limit_bytes is not None:
                excess = max(excess, used + missing - self.limit_bytes)
            freed = self._evict([item for item in stats if item[0].name not in {*by_digest, *keep}], excess)
            if self.limit_bytes is not None and used + missing - freed > self.limit_bytes:
                raise CapacityError(
                    f"the layer files would take {format_size(used + missing - freed)}, and the cache may take "
                    f"{format_size(self.limit_bytes)}",
                    code="cache_limit",
                    remedy="Raise --cache-limit, or offer less memory, so that fewer layers are assigned",
                )
        check_space({self.root: missing})
        return freed

    def prune(self, keep: Collection[str]) -> int:
        """Deletes all blobs but those in `keep`, and unfinished ones that nobody writes; returns the bytes freed."""
        with storage_errors(self.root):
            return self._evict((item for item in self._stats() if item[0].name not in keep), 1 << 62)

    def _evict(self, candidates: Iterable[tuple[Path, os.stat_result]], excess: int) -> int:
        def order(item: tuple[Path, os.stat_result]) -> tuple[bool, int]:
            return item[1].st_size < _SMALL_BYTES, item[1].st_atime_ns

        freed = 0
        for place, stat in sorted(candidates, key=order):
            if freed >= excess:
                break
            if place.parent != self._partial:
                place.unlink(missing_ok=True)
            elif not _delete_abandoned(place):
                continue
            freed += _allocated(stat)
        return freed

    def _missing_bytes(self, blob: Blob) -> int:
        if self.has(blob.digest):
            return 0
        try:
            return max(0, blob.size - _allocated((self._partial / blob.digest).stat()))
        except FileNotFoundError:
            return blob.size

    def _stats(self) -> Iterator[tuple[Path, os.stat_result]]:
        complete = [self._place(digest) for digest in self.digests()]
        for place in [*complete, *(path for path in self._partial.iterdir() if is_digest(path.name))]:
            with suppress(FileNotFoundError):  # another process evicts too
                yield place, place.stat()

    def _place(self, digest: str) -> Path:
        if not is_digest(digest):  # it becomes a path: nothing but hex may pass
            raise InputError("a blob's digest must be 64 lower-case hex digits", code="bad_digest")
        return self._blobs / digest[:2] / digest

    def _open_partial(self, digest: str) -> tuple[IO[bytes], Path]:
        """Opens the resumable partial under its lock, or a private one where somebody else holds that."""
        self._place(digest)
        temporary = self._partial / digest
        temporary.touch()
        file = temporary.open("r+b", buffering=0)
        if _lock(file, temporary):
            return file, temporary
        file.close()
        private = self._partial / f"{digest}.{secrets.token_hex(8)}"
        file = private.open("x+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file, private

    def _tidy(self, file: IO[bytes], temporary: Path, *, resumable: bool) -> None:
        """Deletes what nobody would resume, while we hold its lock; a committed file is no longer there."""
        stat = os.fstat(file.fileno())
        with suppress(FileNotFoundError):
            if os.path.samestat(stat, temporary.stat()) and not (resumable and stat.st_size):
                temporary.unlink()

    def _sweep(self) -> None:
        """Deletes what crashed processes left under unique names."""
        oldest = time.time() - _STALE_SECONDS
        for place in self._partial.glob("*.*"):
            with suppress(FileNotFoundError):
                if place.stat().st_mtime < oldest:
                    _delete_abandoned(place)

    def _publish(self, file: IO[bytes], temporary: Path, digest: str) -> None:
        """Makes a written, verified temporary file the blob `digest`."""
        temporary.chmod(0o444)
        replace_synced(file, temporary, self._place(digest))
        self._checked[digest] = _stamp(os.fstat(file.fileno()))


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _allocated(stat: os.stat_result) -> int:
    """Bytes that a file takes; one with holes takes fewer than its size."""
    return min(stat.st_size, stat.st_blocks * 512)


def _lock(file: IO[bytes], place: Path) -> bool:
    """Whether we hold the lock on the file at `place` now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have renamed or deleted what we have just opened.
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _delete_abandoned(place: Path) -> bool:
    """Deletes an unfinished blob unless somebody is writing it; holds its lock, so that nobody begins meanwhile."""
    with suppress(FileNotFoundError), place.open("rb") as file:
        if _lock(file, place):
            place.unlink()
            return True
    return False


def _unexpected(expected: Blob, size: int) -> TrustError:
    code = "digest_mismatch" if size == expected.size else "size_mismatch"
    what = "other bytes" if size == expected.size else f"not {expected.size} bytes"
    return TrustError(f"blob {expected.digest} is refused: {what} came", code=code, remedy="Fetch it from elsewhere.")
