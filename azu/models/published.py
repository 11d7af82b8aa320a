"""What a store remembers of the models that were cut into it, so that nothing is cut twice.

    root/published/KEY   the digest of the manifest that a source gave; its bytes are a blob
    root/cutting/KEY     a journal of the files that an unfinished cut has stored, one JSON array a line

KEY is a SHA-256 over what determines the result. Nothing read here is trusted: a digest counts only while its blob is
in the store, which checks it before it is served. Whatever is damaged is cut again.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from azu.durable import make_folder, write_file
from azu.errors import AzuError, ModelError
from azu.models.manifest import Blob, Manifest, is_digest
from azu.models.partial import storage_errors
from azu.models.source import ModelSource
from azu.models.store import LayerStore

__all__ = ["CutJournal", "forget_unfinished", "is_whole", "known_manifest", "published_digests", "source_key"]

_CUT = 4  # raise it when the way a source is cut changes: everything is then cut anew


def source_key(model_id: str, origin: str, revision: str) -> str:
    """Returns what names a publication.

    A hub's commit is git's hash over all files (of those in LFS, over their SHA-256), and `revision_of` one over the
    digests of local ones: where neither id nor revision changed, the result would be the same.
    """
    return hashlib.sha256(json.dumps([_CUT, model_id, origin, revision]).encode()).hexdigest()


def published_digests(store: LayerStore) -> set[str]:
    """Returns the digests of the manifests that sources gave before, which are blobs."""
    with storage_errors(store.root):
        return {record.read_text().strip() for record in (store.root / "published").glob("*")}


def known_manifest(store: LayerStore, key: str) -> Manifest | None:
    """Returns the manifest that a source gave before, provided that all its files are still here."""
    try:
        digest = (store.root / "published" / key).read_text().strip()
        if not (is_digest(digest) and store.check(digest)):
            return None
        manifest = Manifest.from_bytes(store.path(digest).read_bytes())
    except (OSError, ValueError, ModelError):  # absent or damaged
        return None
    return manifest if is_whole(store, manifest) else None


def forget_unfinished(store: LayerStore) -> None:
    """Drops the journals of all cuts that were not finished; none may be at work."""
    with storage_errors(store.root):
        for journal in (store.root / "cutting").glob("*"):
            journal.unlink(missing_ok=True)


def is_whole(store: LayerStore, manifest: Manifest) -> bool:
    """Returns whether all of a model's files are here: the layers are checked when they are sent, the rest now."""
    texts = (manifest.config, *manifest.tokenizer.values())
    return all(store.check(blob.digest) for blob in texts) and all(_is_here(store, blob) for blob in manifest.blobs())


class CutJournal:
    """Which files of a cut are in the store already."""

    def __init__(self, store: LayerStore, source: ModelSource) -> None:
        self._store = store
        self._key = source_key(source.model_id, source.origin, source.revision)
        self._path = store.root / "cutting" / self._key
        self._blobs = self._read()

    def blob(self, label: str) -> Blob | None:
        """Returns the file that an earlier attempt stored under this label, if it is here and whole: it is hashed."""
        blob = self._blobs.get(label)
        is_whole = blob is not None and _is_here(self._store, blob) and self._store.check(blob.digest)
        return blob if is_whole else None

    def add(self, label: str, blob: Blob) -> None:
        """Note a file that was just stored."""
        # A line that a crash tears apart is no JSON, and the next one has to begin on its own.
        line = "\n" + json.dumps([label, blob.digest, blob.size, blob.pieces]) + "\n"
        with storage_errors(self._store.root):
            make_folder(self._path.parent)
            with self._path.open("a") as file:
                file.write(line)

    def finish(self, manifest: Manifest) -> None:
        """Remember the manifest, and drop the journal."""
        digest = self._store.put_bytes(manifest.to_bytes()).digest
        record = self._store.root / "published" / self._key
        with storage_errors(self._store.root):
            make_folder(record.parent)
            write_file(record, digest.encode())
        self.forget()

    def forget(self) -> None:
        """Drop the journal."""
        with storage_errors(self._store.root):
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Blob]:
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except OSError:
            return {}
        return dict(entry for line in lines if (entry := _parse(line)) is not None)


def _parse(line: str) -> tuple[str, Blob] | None:
    try:
        entry: Any = json.loads(line)
        label, digest, size, pieces = entry
        return str(label), Blob(digest, size, pieces)
    except (ValueError, TypeError, AzuError):
        return None


def _is_here(store: LayerStore, blob: Blob) -> bool:
    pieces = blob.piece_list
    return store.has(blob.digest) and (pieces is None or store.has(pieces.digest))
