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
from azu.wire.tensors import WeightFormat
from node.engine.device import DeviceThread
from node.engine.footprint import held_bytes
from node.engine.hardware import Device, packs_layers
from node.engine.stage import load_stage
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
        memory = self._memory(manifest, assignment)
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
        packed = await self._packs(manifest, assignment)
        load = partial(
            load_stage, spec, assignment.dtype, self._device, files, vocab_size=manifest.vocab_size, packed=packed
        )
        before = held_bytes(self._device)
        stage = await self._thread.run(load)
        layer_us = await self._thread.run(stage.measure_layer_us)
        await self._thread.run(partial(stage.measure_pace, min(_MEASURED_ROWS, manifest.context_length)))
        log(logger, logging.INFO, "stage loaded", estimated=format_size(memory.weights + memory.overhead),
            measured=format_size(held_bytes(self._device) - before), packed=packed)  # fmt: skip
        kv_tokens = kv_room(*_stage(manifest, assignment), self._device.vram, assignment.kv_tokens, packed=packed)
        return Loaded(
            manifest.digest, spec.start, spec.end, stage, kv_tokens, memory.kv_per_token, layer_us,
            manifest.context_length, manifest.model_id, stage.pace,
        )  # fmt: skip

    def _memory(self, manifest: Manifest, assignment: Assignment) -> StageMemory:
        """What the stage takes, with as much KV cache as is asked for."""
        if assignment.end > manifest.n_layers:
            raise ModelError(f"{manifest.model_id} has {manifest.n_layers} layers", code="wrong_range")
        memory = stage_memory(*_stage(manifest, assignment), assignment.kv_tokens)
        if memory.total > self._device.vram:
            raise CapacityError(
                f"layers {assignment.start}-{assignment.end - 1} need {format_size(memory.total)} "
                f"({format_size(memory.weights)} of weights, {format_size(memory.kv)} of KV cache for "
                f"{assignment.kv_tokens} tokens), {format_size(self._device.vram)} are offered",
                code="not_enough_vram",
                remedy="Offer more with --vram",
            )
        return memory

    async def _packs(self, manifest: Manifest, assignment: Assignment) -> bool:
        """Whether layers are prepacked where that is a choice: it has to pay, and its kernels to fit too."""
        memory = stage_memory(*_stage(manifest, assignment), assignment.kv_tokens, packed=True)
        fits = memory.total <= self._device.vram
        return fits and await self._thread.run(partial(packs_layers, assignment.dtype, self._device))


def _stage(manifest: Manifest, assignment: Assignment) -> tuple[Manifest, int, int, WeightFormat]:
    return manifest, assignment.start, assignment.end, assignment.dtype
