"""What a worker is assigned, brought onto its disk: the manifest, and the files of a stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from azu.distribution import FetchProgress, Library, fetch_blobs, fetch_manifest, hub_fallback
from azu.errors import ModelError, NetworkError
from azu.logs import log
from azu.models.manifest import Blob, Manifest
from azu.models.source import load_json
from azu.overlay import Overlay
from azu.sizes import format_size
from azu.tickets import Assignment
from node.trust import Trust

__all__ = ["Supply"]

logger = logging.getLogger(__name__)

_MAX_CONFIG_BYTES = 4 << 20  # a hundred times the largest in use; parsing it takes memory and the event loop's time


class Supply:
    """Fetches for one worker, which loads one stage at a time.

    Args:
        use_hub: whether files that no peer has may come from the repository that the model was published from.
    """

    def __init__(self, overlay: Overlay, library: Library, trust: Trust, *, use_hub: bool) -> None:
        self.progress = FetchProgress()  # of the stage that is being fetched, or was last
        self._overlay = overlay
        self._library = library
        self._trust = trust
        self._use_hub = use_hub

    async def manifest(self, assignment: Assignment) -> Manifest:
        """The manifest that an assignment names: from disk, from its coordinator, or from anybody who provides it.

        Raises:
            NetworkError: nobody has it, signed by whom this worker serves.
        """
        self.progress = FetchProgress()
        known = dict(await trio.to_thread.run_sync(self._library.manifests)).get(assignment.manifest)
        if known is not None:
            return known
        fetch = partial(fetch_manifest, self._overlay, digest=assignment.manifest, is_trusted=self._trust)
        try:
            envelope, manifest = await fetch([assignment.coordinator])
        except NetworkError:
            providers = await self._providers(assignment.manifest)
            envelope, manifest = await fetch([assignment.coordinator, *providers])
        await trio.to_thread.run_sync(self._library.keep, assignment.manifest, envelope)
        return manifest

    async def config(self, assignment: Assignment, manifest: Manifest) -> dict[str, Any]:
        """The model's config.json; raises as `files` does, and ModelError, code "bad_json"."""
        if manifest.config.size > _MAX_CONFIG_BYTES:
            raise ModelError(f"config.json of {manifest.model_id} has {manifest.config.size} bytes", code="bad_json")
        await self._fetch(assignment, manifest, [manifest.config], FetchProgress())
        return load_json(self._library.store.path(manifest.config.digest).read_bytes(), "config.json")

    async def files(self, assignment: Assignment, manifest: Manifest, blobs: Mapping[str, Blob]) -> dict[str, Path]:
        """Where a stage's files lie, by the keys of `blobs`, once they do; what is in their way is deleted.

        Raises:
            NetworkError: nobody has some file. CapacityError: the cache's limit is too small for them.
            InternalError: the disk is. ModelError: the manifest contradicts itself.
        """
        store, wanted = self._library.store, list(blobs.values())
        lists = [blob.piece_list for blob in wanted if blob.piece_list is not None]
        freed = await trio.to_thread.run_sync(store.make_room, [*wanted, *lists], {manifest.config.digest})
        if freed:
            log(logger, logging.INFO, "unused layer files deleted", size=format_size(freed))
        await self._fetch(assignment, manifest, wanted, self.progress)
        return {label: store.path(blob.digest) for label, blob in blobs.items()}

    async def _fetch(
        self, assignment: Assignment, manifest: Manifest, blobs: Iterable[Blob], progress: FetchProgress
    ) -> None:
        store = self._library.store
        await fetch_blobs(
            self._overlay,
            store,
            blobs,
            peers=[assignment.coordinator],
            offenders=self._library.offenders,
            find_more=partial(self._providers, manifest.digest),
            fallback=hub_fallback(manifest, store, progress) if self._use_hub else None,
            progress=progress,
        )

    async def _providers(self, digest: str) -> Sequence[str]:
        return await self._overlay.providers(bytes.fromhex(digest))
