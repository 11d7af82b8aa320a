"""Files of a hub's repository in huggingface_hub's cache: fetched with resumption, checked, and linked.

    HF_HUB_CACHE/models--OWNER--NAME/blobs/DIGEST                  a file, under the digest that the hub publishes
                                    /blobs/DIGEST.azu.incomplete   what has come of it so far
                                    /snapshots/COMMIT/FILE         a link to its blob
                                    /refs/REVISION                 the commit of a branch or tag
                                    /azu/COMMIT.json               what the hub lists of it, for when it is out of reach

But for the names with "azu" the layout is the documented one
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache), so that other programs share the files.
huggingface_hub finds addresses, credentials and errors. The bytes are streamed here, because its own downloads begin a
file anew after a crash, and those through hf-xet cannot be stopped between two chunks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import constants, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from azu.durable import make_folder, replace_synced, write_file
from azu.errors import TrustError
from azu.models.hub_http import Retries, request_file

__all__ = ["DIGEST", "HubFile", "HubRepo", "RepoCache"]

_CHUNK = 1 << 20  # bytes hashed between two reports
_PAUSES = (1.0, 2.0, 4.0, 8.0)
_LOCK_POLL_S = 0.2
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # of a HubFile


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it.

    Args:
        name: without folders.
        size: in bytes.
        digest: its SHA-256 (64 hex digits) where it lies in LFS, else git's name of the blob: the SHA-1 (40) of
            "blob SIZE", a zero byte and the content.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A model's repository at one commit: the files that a model may be made of, and the names of its pickles."""

    repo_id: str
    commit: str
    files: dict[str, HubFile]
    pickles: tuple[str, ...] = ()


class RepoCache:
    """One repository's folder in the cache. Several processes may use it at once."""

    def __init__(self, repo_id: str) -> None:
        self._repo_id = repo_id
        self.folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")

    def snapshot(self, commit: str) -> Path:
        """Where the files of a commit lie."""
        return self.folder / "snapshots" / commit

    def remember(self, revision: str, repo: HubRepo) -> None:
        """Note what the hub says that a branch, tag or commit is now."""
        if revision != repo.commit:
            _write(self.folder / "refs" / revision, repo.commit)
        listing = [repo.pickles, [astuple(file) for file in repo.files.values()]]
        _write(self._listing(repo.commit), json.dumps(listing))

    def recall(self, revision: str) -> HubRepo | None:
        """What the hub last said of a revision, or None; without a network."""
        try:
            is_commit = re.fullmatch(r"[0-9a-f]{40}", revision) is not None
            commit = revision if is_commit else (self.folder / "refs" / revision).read_text().strip()
            pickles, entries = json.loads(self._listing(commit).read_bytes())
            files = {entry[0]: HubFile(*entry) for entry in entries}
            return HubRepo(self._repo_id, commit, files, tuple(pickles))
        except (OSError, ValueError, TypeError, LookupError):  # absent or damaged
            return None

    def missing_bytes(self, file: HubFile) -> int:
        """How much of a file has yet to come."""
        if self._blob(file).exists():
            return 0
        with suppress(OSError):
            return max(0, file.size - self._partial(file).stat().st_size)
        return file.size

    def fetch(self, repo: HubRepo, file: HubFile, advance: Callable[[int], None], counted: int = 0) -> Path:
        """Bring a file here, from where an earlier attempt stopped, and return where it lies; it is not verified yet.

        Args:
            advance: told how many bytes more are here, as they come; bytes given up count as negative. It may raise to
                end the transfer.
            counted: bytes of the file that whoever counts knows of already.

        Raises:
            TrustError: code "size_mismatch", where the hub has not as many bytes as it lists; they are deleted.
            HfHubHTTPError, httpx2.HTTPError: the hub refuses, or breaks off again and again.
            OSError: the disk is full; then what had come of this file is deleted.
        """
        blob = self._blob(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        if blob.exists():
            advance(file.size - counted)
        else:
            with _locked(self._partial(file), advance) as partial:
                if blob.exists():  # another process has completed it meanwhile
                    advance(file.size - counted)
                else:
                    _complete(partial, repo, file, advance, counted)
                    replace_synced(partial, self._partial(file), blob)
        return self._link(repo.commit, file)

    def verify(self, repo: HubRepo, file: HubFile, advance: Callable[[int], None]) -> str:
        """Check a fetched file against the hub's digest, and return its SHA-256.

        Raises:
            TrustError: code "digest_mismatch"; the file is deleted, so that the next attempt fetches it again.
        """
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        is_lfs = len(file.digest) == 64
        path = self.snapshot(repo.commit) / file.name
        with path.open("rb") as content:
            while chunk := content.read(_CHUNK):
                sha256.update(chunk)
                if not is_lfs:
                    git.update(chunk)
                advance(len(chunk))
        if (sha256 if is_lfs else git).hexdigest() != file.digest:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise TrustError(
                f"{file.name} of {repo.repo_id} does not have the {'SHA-256' if is_lfs else 'git SHA-1'} that the hub "
                "publishes",
                code="digest_mismatch",
                remedy="It was deleted from the hub cache: try again. If that repeats, something between here and the "
                "hub changes files.",
            )
        return sha256.hexdigest()

    def _listing(self, commit: str) -> Path:
        return self.folder / "azu" / f"{commit}.json"

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.digest

    def _partial(self, file: HubFile) -> Path:
        return self.folder / "blobs" / f"{file.digest}.azu.incomplete"

    def _link(self, commit: str, file: HubFile) -> Path:
        link = self.snapshot(commit) / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        target = Path("../../blobs") / file.digest
        if not link.exists():
            link.unlink(missing_ok=True)  # a link whose blob was deleted
            with suppress(FileExistsError):  # another process was faster
                link.symlink_to(target)
        return link


def _write(path: Path, text: str) -> None:
    make_folder(path.parent)
    write_file(path, text.encode())


def _complete(partial: IO[bytes], repo: HubRepo, file: HubFile, advance: Callable[[int], None], counted: int) -> None:
    """Append to a partial file until it has its size."""
    if partial.tell() > file.size:
        partial.truncate(0)
        partial.seek(0)
    advance(partial.tell() - counted)
    retries = Retries(_PAUSES)
    while (offset := partial.tell()) < file.size:
        try:
            _append(partial, repo, file, advance)
        except (HfHubHTTPError, httpx2.TransportError) as error:
            retries.pause(error, moved=partial.tell() > offset)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                Path(partial.name).unlink(missing_ok=True)  # it would keep the disk full
            raise


def _append(partial: IO[bytes], repo: HubRepo, file: HubFile, advance: Callable[[int], None]) -> None:
    offset = partial.tell()
    with request_file(repo.repo_id, file.name, repo.commit, f"{offset}-" if offset else "") as response:
        if response.status_code == 416:  # there is no more, and it is too short
            raise _discarded(partial, file)
        hf_raise_for_status(response)
        if offset and response.status_code != 206:  # it knows no ranges: everything once more
            advance(-offset)
            partial.truncate(0)
            partial.seek(0)
        for chunk in response.iter_raw():
            if partial.tell() + len(chunk) > file.size:
                raise _discarded(partial, file)
            partial.write(chunk)
            advance(len(chunk))


def _discarded(partial: IO[bytes], file: HubFile) -> TrustError:
    Path(partial.name).unlink(missing_ok=True)
    remedy = "Try again; if that repeats, something between here and the hub changes files."
    return TrustError(
        f"{file.name} is not of the {file.size} bytes that the hub lists", code="size_mismatch", remedy=remedy
    )


@contextmanager
def _locked(path: Path, advance: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """The partial file, open at its end, once no other process holds it."""
    while (file := _try_to_lock(path)) is None:
        advance(0)
        time.sleep(_LOCK_POLL_S)
    with file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:  # as after a refusal
                path.unlink(missing_ok=True)


def _try_to_lock(path: Path) -> IO[bytes] | None:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have renamed or deleted what we have just opened.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None
