"""The device that a worker computes on, and what pays on it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from azu.errors import InputError
from azu.models.prepacked import layers_pay
from azu.models.quantize import held_weights
from azu.wire.tensors import DType, WeightFormat
from node.engine.allocator import settle_allocator

__all__ = ["Device", "find_device", "packs_layers", "require_packages"]

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
    held_weights(dtype, torch.device(device.torch_name))


def packs_layers(dtype: WeightFormat, device: Device) -> bool:
    """Whether it pays to have oneDNN prepack a stage's layers where that is a choice; on the device thread."""
    return dtype == "float32" and device.torch_name == "cpu" and layers_pay()
