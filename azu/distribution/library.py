"""What a node has on disk: layer files, the manifests they belong to, and who sent wrong bytes."""

from __future__ import annotations

import logging
from pathlib import Path

from azu.distribution.offenders import Offenders
from azu.durable import make_folder, write_file
from azu.errors import AzuError, InternalError, TrustError
from azu.identity import Identity, Kind, open_envelope, seal
from azu.logs import log
from azu.models.manifest import Manifest, is_digest
from azu.models.store import LayerStore

__all__ = ["Library", "open_manifest"]

logger = logging.getLogger(__name__)


class Library:
    """A data folder's layer files by digest, and the manifests they belong to.

    Args:
        cache_limit: bytes that the layer files may take; None lets them grow as long as the disk has room.
    """

    def __init__(self, root: Path, *, cache_limit: int | None = None) -> None:
        self.store = LayerStore(root / "layers", limit_bytes=cache_limit)
        self.offenders = Offenders(root / "offenders.json")
        self._manifests = root / "manifests"
        try:
            make_folder(self._manifests)
        except OSError as error:
            raise InternalError(
                f"{self._manifests} cannot be made: {error.strerror}", remedy="Give --data-dir a writable folder"
            ) from error

    def publish(self, identity: Identity, manifest: Manifest) -> None:
        """Sign a manifest as its publisher and keep it."""
        self.keep(manifest.digest, seal(identity, Kind.MANIFEST, manifest.to_bytes()))

    def keep(self, digest: str, envelope: bytes) -> None:
        """Keep a checked manifest's envelope."""
        path = self._manifests / digest
        try:
            write_file(path, envelope)
        except OSError as error:
            raise InternalError(f"{path} cannot be written: {error.strerror}", remedy="Free some disk space") from error

    def envelope(self, digest: str) -> bytes | None:
        """A kept manifest's envelope; `digest` has been validated as 64 hex digits by the wire's schema."""
        try:
            return (self._manifests / digest).read_bytes()
        except OSError:
            return None

    def manifests(self) -> tuple[tuple[str, Manifest], ...]:
        """(digest, manifest) of all that are kept; a damaged one is left out and logged."""
        found: list[tuple[str, Manifest]] = []
        for path in sorted(self._manifests.iterdir()):
            if not is_digest(path.name):
                continue
            try:
                found.append((path.name, open_manifest(path.read_bytes(), path.name)[1]))
            except (AzuError, OSError) as error:
                log(logger, logging.WARNING, "damaged manifest ignored", path=path, reason=str(error))
        return tuple(found)

    def cached_range(self, manifest: Manifest) -> tuple[int, int] | None:
        """The longest [start, end) of a model's layers whose files are all here, or None."""
        best, start = (0, 0), 0
        for index, blob in enumerate(manifest.layers):
            if not self.store.has(blob.digest):
                start = index + 1
            elif index + 1 - start > best[1] - best[0]:
                best = (start, index + 1)
        return best if best[1] else None


def open_manifest(envelope: bytes, digest: str) -> tuple[str, Manifest]:
    """The publisher's peer id and the manifest.

    Raises:
        TrustError: signature or digest does not hold.
        ModelError: the content is not a manifest.
    """
    signed = open_envelope(envelope, Kind.MANIFEST)
    manifest = Manifest.from_bytes(signed.payload)
    if manifest.digest != digest:
        raise TrustError(f"a manifest's digest is {manifest.digest[:12]}, not {digest[:12]}", code="digest_mismatch")
    return signed.peer_id, manifest
