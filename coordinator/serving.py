"""Which models a running coordinator serves: those of its command line, and those of its catalogue as it changes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

import trio

from azu.distribution import Library
from azu.errors import AzuError, InputError, ModelError
from azu.logs import log
from azu.models.manifest import Manifest
from azu.models.published import is_whole
from coordinator.catalogue import Catalogue
from coordinator.generation import ServedModel

__all__ = ["Serving"]

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


class Serving:
    """The models served now, by id; where both name one, the catalogue counts. `follow` keeps them current."""

    def __init__(self, library: Library, catalogue: Catalogue) -> None:
        self.changed = trio.Event()  # set with each change, and then replaced
        self._library = library
        self._catalogue = catalogue
        self._pinned: dict[str, ServedModel] = {}
        self._listed: dict[str, ServedModel] = {}
        self._retired: frozenset[str] = frozenset()
        self._stamp: object = None

    def models(self) -> Sequence[ServedModel]:
        """What is served."""
        return tuple((self._pinned | self._listed).values())

    def manifests(self) -> Sequence[Manifest]:
        """The same, as their manifests."""
        return tuple(model.manifest for model in self.models())

    def is_listed(self, digest: str) -> bool:
        """Whether the catalogue, as it is now, or the command line has the model with this manifest."""
        with suppress(InputError):  # a damaged catalogue lists nothing
            if any(model.manifest == digest for model in self._catalogue.models()):
                return True
        return any(model.manifest.digest == digest for model in self._pinned.values())

    def retired(self) -> frozenset[str]:
        """Digests of the models that this coordinator published and does not serve any more."""
        return self._retired

    def pin(self, manifest: Manifest) -> None:
        """Serve a model that the command line names, whatever becomes of the catalogue."""
        self._pinned[manifest.model_id] = self._served(manifest)

    def refresh(self) -> list[Manifest]:
        """Read the catalogue, and return what is not served any more. Blocks for the reading of small files.

        Raises:
            InputError: the catalogue is damaged.
        """
        before = self.manifests()
        self._stamp = self._catalogue.stamp()
        known = dict(self._library.manifests())
        listed: dict[str, ServedModel] = {}
        for model in self._catalogue.models():
            try:
                was = self._listed.get(model.model_id)
                if was is None or was.manifest.digest != model.manifest:
                    was = self._served(known[model.manifest])
                listed[model.model_id] = was
            except (KeyError, AzuError, OSError) as error:
                reason = "its manifest is missing" if isinstance(error, KeyError) else str(error)
                log(logger, logging.ERROR, "listed model is not complete", model=model.model_id, reason=reason,
                    remedy="Shard it again.")  # fmt: skip
        self._listed = listed
        served = {manifest.digest for manifest in self.manifests()}
        self._retired = frozenset(known.keys() - served)
        return [manifest for manifest in before if manifest.digest not in served]

    async def follow(self) -> None:
        """Take up changes of the catalogue until cancelled; files of what is not served any more are deleted."""
        while True:
            await trio.sleep(_LOOK_S)
            if self._catalogue.stamp() == self._stamp:
                continue
            try:
                gone = await trio.to_thread.run_sync(self.refresh)
                self.changed.set()
                self.changed = trio.Event()
                log(logger, logging.INFO, "models changed", models=[model.model_id for model in self.models()])
                for manifest in gone:
                    await trio.to_thread.run_sync(self._catalogue.free, self._library, manifest, self.manifests())
            except (AzuError, OSError) as error:
                log(logger, logging.WARNING, "catalogue not taken up", reason=str(error))

    def _served(self, manifest: Manifest) -> ServedModel:
        store = self._library.store
        if not is_whole(store, manifest):
            raise ModelError("files of it are missing or damaged", code="missing_blob")
        return ServedModel(
            manifest=manifest,
            tokenizer_files={name: store.path(blob.digest) for name, blob in manifest.tokenizer.items()},
            config=json.loads(store.path(manifest.config.digest).read_bytes()),
            created=int(time.time()),
        )
