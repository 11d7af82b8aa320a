"""From an assignment to a loaded stage: manifest, files, memory check, device."""

from __future__ import annotations

import logging
from functools import partial

from azu.errors import CapacityError, ModelError
from azu.logs import log
from azu.models.manifest import Manifest
from azu.models.memory import StageMemory, kv_room, stage_memory
from azu.models.splice import StageSpec, stage_tensor_names
from azu.sizes import format_size
from azu.tickets import Assignment
from node.engine.device import DeviceThread
from node.engine.footprint import held_bytes
from node.engine.stage import Device, load_stage
from node.jobs import Loaded
from node.supply import Supply

__all__ = ["Loader"]

logger = logging.getLogger(__name__)

_MEASURED_ROWS = 64  # of a prompt: what more of them would show is not worth the time


class Loader:
    """Loads what a worker is assigned."""

    def __init__(self, supply: Supply, thread: DeviceThread, device: Device) -> None:
        self._supply = supply
        self._thread = thread
        self._device = device

    @property
    def percent(self) -> int:
        """How much of the stage's files is here, of 100."""
        return self._supply.progress.percent

    async def load(self, assignment: Assignment) -> Loaded:
        """Fetch what is missing, and build the stage.

        Raises:
            NetworkError: nobody has the files. TrustError: the manifest's signature or publisher does not hold.
            CapacityError: the stage does not fit. ModelError: it cannot be built.
        """
        manifest = await self._supply.manifest(assignment)
        kv_tokens, memory = self._kv_room(manifest, assignment)
        spec = StageSpec(
            config=await self._supply.config(assignment, manifest),
            start=assignment.start,
            end=assignment.end,
            n_layers=manifest.n_layers,
        )
        _, shared = await self._thread.run(partial(stage_tensor_names, spec))
        blobs = manifest.blobs_for(spec.start, spec.end, shared)
        size = format_size(sum(blob.size for blob in blobs.values()))
        layers = f"{spec.start}-{spec.end - 1}"
        log(logger, logging.INFO, "fetching layers", model=manifest.model_id, layers=layers, size=size)
        files = await self._supply.files(assignment, manifest, blobs)
        load = partial(load_stage, spec, assignment.dtype, self._device, files, vocab_size=manifest.vocab_size)
        before = held_bytes(self._device)
        stage = await self._thread.run(load)
        layer_us = await self._thread.run(stage.measure_layer_us)
        await self._thread.run(partial(stage.measure_pace, min(_MEASURED_ROWS, manifest.context_length)))
        log(logger, logging.INFO, "stage loaded", estimated=format_size(memory.weights + memory.overhead),
            measured=format_size(held_bytes(self._device) - before))  # fmt: skip
        return Loaded(
            manifest.digest, spec.start, spec.end, stage, kv_tokens, memory.kv_per_token, layer_us,
            manifest.context_length, manifest.model_id, stage.pace,
        )  # fmt: skip

    def _kv_room(self, manifest: Manifest, assignment: Assignment) -> tuple[int, StageMemory]:
        """Positions of KV cache that fit beside the weights, at least what is asked for, and what all takes then."""
        if assignment.end > manifest.n_layers:
            raise ModelError(f"{manifest.model_id} has {manifest.n_layers} layers", code="wrong_range")
        stage = manifest, assignment.start, assignment.end, assignment.dtype
        memory = stage_memory(*stage, assignment.kv_tokens)
        if memory.total > self._device.vram:
            raise CapacityError(
                f"layers {assignment.start}-{assignment.end - 1} need {format_size(memory.total)} "
                f"({format_size(memory.weights)} of weights, {format_size(memory.kv)} of KV cache for "
                f"{assignment.kv_tokens} tokens), {format_size(self._device.vram)} are offered",
                code="not_enough_vram",
                remedy="Offer more with --vram",
            )
        return kv_room(*stage, self._device.vram, assignment.kv_tokens), memory
