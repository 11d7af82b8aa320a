"""From an assignment to a loaded stage: manifest, files, memory check, device."""

from __future__ import annotations

import json
import logging
from functools import partial

import trio

from azu.distribution import Library, fetch_blobs, fetch_manifest
from azu.errors import CapacityError, ModelError, TrustError
from azu.logs import log
from azu.models.manifest import Manifest
from azu.models.memory import kv_bytes, weights_bytes
from azu.models.splice import StageSpec, stage_tensor_names
from azu.overlay import Overlay
from azu.sizes import format_size
from azu.tickets import Assignment
from node.engine.device import DeviceThread
from node.engine.stage import Device, load_stage
from node.jobs import Loaded
from node.trust import Trust

__all__ = ["Loader"]

logger = logging.getLogger(__name__)


class Loader:
    """Loads what a worker is assigned."""

    def __init__(self, overlay: Overlay, library: Library, thread: DeviceThread, device: Device, trust: Trust) -> None:
        self._overlay = overlay
        self._library = library
        self._thread = thread
        self._device = device
        self._trust = trust

    async def load(self, assignment: Assignment) -> Loaded:
        """Fetch what is missing, and build the stage.

        Raises:
            NetworkError: nobody has the files. TrustError: the manifest's signature or publisher does not hold.
            CapacityError: the stage does not fit. ModelError: it cannot be built.
        """
        manifest = await self._manifest(assignment)
        kv_tokens, per_token = self._kv_room(manifest, assignment)
        peers = [assignment.coordinator]
        peers += [p for p in await self._overlay.providers(bytes.fromhex(manifest.digest)) if p not in peers]
        store = self._library.store
        await fetch_blobs(self._overlay, peers, store, [manifest.config])
        spec = StageSpec(
            config=json.loads(store.path(manifest.config.digest).read_bytes()),
            start=assignment.start,
            end=assignment.end,
            n_layers=manifest.n_layers,
        )
        _, shared = await self._thread.run(partial(stage_tensor_names, spec))
        blobs = manifest.blobs_for(spec.start, spec.end, shared)
        size = format_size(sum(blob.size for blob in blobs.values()))
        layers = f"{spec.start}-{spec.end - 1}"
        log(logger, logging.INFO, "fetching layers", model=manifest.model_id, layers=layers, size=size)
        await fetch_blobs(self._overlay, peers, store, blobs.values())
        files = {name: store.path(blob.digest) for name, blob in blobs.items()}
        load = partial(load_stage, spec, assignment.dtype, self._device, files, vocab_size=manifest.vocab_size)
        stage = await self._thread.run(load)
        layer_us = await self._thread.run(stage.measure_layer_us)
        return Loaded(manifest.digest, spec.start, spec.end, stage, kv_tokens, per_token, layer_us)

    async def _manifest(self, assignment: Assignment) -> Manifest:
        known = dict(await trio.to_thread.run_sync(self._library.manifests)).get(assignment.manifest)
        if known is not None:
            return known
        peers = [assignment.coordinator]
        envelope, publisher, manifest = await fetch_manifest(self._overlay, peers, assignment.manifest)
        if not self._trust(publisher):
            raise TrustError(f"the manifest is signed by {publisher}, whom this worker does not serve")
        self._library.keep(assignment.manifest, envelope)
        return manifest

    def _kv_room(self, manifest: Manifest, assignment: Assignment) -> tuple[int, int]:
        """Positions of KV cache that fit beside the weights, at least what is asked for, and the bytes of each."""
        if assignment.end > manifest.n_layers:
            raise ModelError(f"{manifest.model_id} has {manifest.n_layers} layers", code="wrong_range")
        weights = weights_bytes(manifest, assignment.start, assignment.end, assignment.dtype)
        per_token = kv_bytes(manifest, assignment.start, assignment.end, 1, assignment.dtype)
        fitting = (self._device.vram - weights) // per_token
        if fitting < assignment.kv_tokens:
            needed = format_size(weights + per_token * assignment.kv_tokens)
            raise CapacityError(
                f"layers {assignment.start}-{assignment.end - 1} with a KV cache of {assignment.kv_tokens} tokens need "
                f"{needed}, {format_size(self._device.vram)} are offered",
                code="not_enough_vram",
                remedy="Offer more with --vram",
            )
        return fitting, per_token
