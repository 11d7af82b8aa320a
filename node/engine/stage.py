"""A loaded stage as the rest of the node sees it: bytes in, bytes or a token out, no torch types at the surface.

Every method that touches a tensor is synchronous and must run on the device thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from azu.errors import AzuError, CapacityError, InputError, InternalError, ModelError
from azu.models.quantize import integer_weights, return_freed_memory
from azu.models.splice import Stage, StageSpec, build_stage
from azu.tickets import Sampling
from azu.wire.frames import Buffer
from azu.wire.tensors import ACTIVATIONS, DType, TensorHeader, WeightFormat
from node.engine.allocator import settle_allocator
from node.engine.sampler import Sampler

__all__ = ["Device", "JobState", "LoadedStage", "Output", "find_device", "load_stage", "require_packages"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of a GPU's free memory, and of the free main memory where the CPU computes: the rest is for activations, the allocator
# and whatever else the owner runs.
_GPU_SHARE, _CPU_SHARE = 0.9, 0.6
_CUDA_LIBRARIES = 64 << 20  # bytes: what cuBLAS takes for itself at its first product; the context is taken already


@dataclass(frozen=True, slots=True)
class Device:
    """Where a worker computes. `vram` is the memory in bytes that it may use."""

    torch_name: str
    label: str
    vram: int
    native_dtype: DType  # the dtype that "auto" stands for on it


@dataclass(frozen=True, slots=True)
class Output:
    """What one step gave: hidden states for the next stage, or (in the last stage) a token, or nothing yet."""

    tensor: TensorHeader | None = None
    body: Buffer = b""
    token: int | None = None


class JobState:
    """One job's KV cache and sampler in one stage."""

    def __init__(self, cache: Any, sampler: Sampler | None) -> None:
        self.cache = cache
        self.sampler = sampler
        self.position = 0  # positions in the cache


def _plain_strides(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The chunk's last row as a tensor of its own: for a view of the chunk, oneDNN copies the head's whole weight."""
    return (inputs[0].flatten().view(inputs[0].shape), *inputs[1:])


class LoadedStage:
    """Layers [start, end) of a model, ready to run."""

    def __init__(self, stage: Stage, spec: StageSpec, dtype: WeightFormat, device: Device, vocab_size: int) -> None:
        self._stage = stage
        self._device = torch.device(device.torch_name)
        self._activations = ACTIVATIONS[dtype]
        self._dtype = _DTYPES[self._activations]
        self.dtype = dtype  # of its weights
        self.is_first = spec.start == 0
        self.is_last = spec.end == spec.n_layers
        self.hidden_size = stage.hidden_size
        self.vocab_size = vocab_size
        self.n_layers = spec.end - spec.start
        if self.is_last and self._dtype != torch.float32:
            head: Any = stage.model.get_output_embeddings()  # type: ignore[no-untyped-call]  # upstream
            head.register_forward_pre_hook(_plain_strides)

    def open_job(self, sampling: Sampling, prompt: tuple[int, ...] = (), tokens: int = 0) -> JobState:
        """The state of a new job, with KV cache for `tokens` (it grows where more come).

        `prompt` is needed only for a repetition penalty in the last stage.
        """
        return JobState(self._stage.new_cache(tokens), Sampler(sampling, prompt) if self.is_last else None)

    def run_tokens(self, job: JobState, tokens: tuple[int, ...], *, sample: bool) -> Output:
        """First stage only: run token ids at the job's position."""
        return self._run(job, torch.tensor(tokens, dtype=torch.int64, device=self._device), sample)

    def run_hidden(self, job: JobState, body: bytearray, rows: int, *, sample: bool) -> Output:
        """Run hidden states [rows, hidden] that came as `body`, whose memory is used in place."""
        hidden = torch.frombuffer(body, dtype=self._dtype).view(rows, self.hidden_size)
        return self._run(job, hidden.to(self._device), sample)

    @torch.inference_mode()
    def _run(self, job: JobState, inputs: torch.Tensor, sample: bool) -> Output:
        try:
            result = self._stage.forward(inputs, job.cache, job.position)
            job.position += len(inputs)
            if not self.is_last:
                return self._encode(result)
            if not sample or job.sampler is None:
                return Output()
            return Output(token=job.sampler.sample(result.reshape(-1)))
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "the device is out of memory",
                code="device_out_of_memory",
                remedy="Give the worker a smaller --vram so that it takes fewer layers",
            ) from error
        except AzuError:
            raise
        except Exception as error:  # a border: anything may come out of a family's code
            raise InternalError(f"the stage failed: {error}", code="stage_failed") from error

    def _encode(self, hidden: torch.Tensor) -> Output:
        hidden = hidden.to("cpu").contiguous()
        body = memoryview(hidden.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs
        return Output(TensorHeader(dtype=self._activations, shape=tuple(hidden.shape)), body)

    def measure_layer_us(self, steps: int = 4) -> int:
        """Microseconds per decoded token and layer: the fastest of a few steps after a warm-up."""
        job = JobState(self._stage.new_cache(), None)
        inputs = (
            torch.ones(1, dtype=torch.int64, device=self._device)
            if self.is_first
            else torch.zeros(1, self.hidden_size, dtype=self._dtype, device=self._device)
        )
        best = float("inf")
        for _ in range(steps + 1):
            started = time.perf_counter()
            self._run(job, inputs, sample=False)
            best = min(best, time.perf_counter() - started)
        return max(1, round(best * 1e6 / self.n_layers))


def find_device(name: str, vram: int | None, threads: int) -> Device:
    """The device called `name` ("auto", "cpu", "cuda:N") with the memory that may be used on it.

    Args:
        vram: bytes to use at most; measured where None. On CUDA no more than is free, whatever is asked for.
        threads: CPU threads to compute with, in the whole process.

    Raises:
        InputError: there is no such device.
    """
    settle_allocator()
    torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise InputError(
                f"there is no device {name}: torch sees {torch.cuda.device_count()} CUDA devices",
                code="no_such_device",
                remedy="Use --device cpu, or install a CUDA build of torch and its driver",
            )
        free, _ = torch.cuda.mem_get_info(index)
        label = torch.cuda.get_device_name(index)
        free -= _CUDA_LIBRARIES
        return Device(f"cuda:{index}", label, min(vram, free) if vram else int(free * _GPU_SHARE), "bfloat16")
    if name != "cpu":
        raise InputError(f"device {name} is not supported", code="no_such_device", remedy="Use auto, cpu or cuda:N")
    available = psutil.virtual_memory().available
    label = f"CPU ({threads} threads)"
    return Device("cpu", label, vram or int(available * _CPU_SHARE), "float32")


def require_packages(dtype: WeightFormat, device: Device) -> None:
    """Raises InputError, code "missing_package", where a format needs a package that is not installed."""
    integer_weights(dtype, torch.device(device.torch_name))


def load_stage(
    spec: StageSpec, dtype: WeightFormat, device: Device, files: Mapping[str, Path], *, vocab_size: int
) -> LoadedStage:
    """Build a stage out of its safetensors files.

    Raises:
        ModelError: the files or the architecture are unusable, or the vocabulary is not the manifest's.
        CapacityError: the device's memory does not suffice.
        InputError: integer weights are wanted and torchao is not installed.
    """
    computing = torch.device(device.torch_name)
    try:
        stage = build_stage(spec, _DTYPES[ACTIVATIONS[dtype]], computing, files, integer_weights(dtype, computing))
        return_freed_memory()
        _check_vocabulary(stage, vocab_size)
        return LoadedStage(stage, spec, dtype, device, vocab_size)
    except torch.OutOfMemoryError as error:
        raise CapacityError("the stage does not fit in the device's memory", code="device_out_of_memory") from error


def _check_vocabulary(stage: Stage, vocab_size: int) -> None:
    """Token ids are checked against `vocab_size` alone; one past the embedding's end would put a GPU out of use."""
    model: Any = stage.model
    too_few = stage.is_first and len(model.get_input_embeddings().weight) < vocab_size
    if too_few or (stage.is_last and len(model.get_output_embeddings().weight) > vocab_size):
        raise ModelError(f"the model's vocabulary is not of {vocab_size} tokens", code="bad_manifest")
