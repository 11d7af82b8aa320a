"""Reads a stage's tensors out of its layer files, under the names that the spliced module uses.

Files name layers as the whole model counts them; a stage counts from zero. Older checkpoints also leave out the base
model's prefix ("h.3." for "transformer.h.3."), so names are matched by their ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from azu.errors import ModelError
from azu.models.layout import is_head
from azu.models.safetensors_file import TensorFile, open_tensors

__all__ = ["LayerNames", "StoredTensor", "open_stored"]

_COPY_BYTES = 16 << 20  # of a file, before its pages are dropped again
_NUMBERED = re.compile(r"^(.*?)(\d{1,5})\.(.+)$")
_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Layers start..end of the whole model, in a module that calls its list of layers `container` ("model.layers.")."""

    container: str
    start: int
    end: int

    def local(self, name: str) -> str | None:
        """Returns what the module calls a checkpoint's tensor; None where it is not of these layers."""
        match = _NUMBERED.match(name)
        if match is None or not _same_end(match[1], self.container):
            return None
        index = int(match[2])
        return f"{self.container}{index - self.start}.{match[3]}" if self.start <= index < self.end else None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in its file, mapped but not read: `tensor[...]` does that, as transformers' loader calls it."""

    file: TensorFile
    name: str
    dtype: torch.dtype | None

    def __getitem__(self, _everything: object) -> torch.Tensor:
        return _copy(self.file, self.name, self.dtype)


@contextmanager
def open_stored(
    paths: Iterable[Path],
    layers: LayerNames,
    shared: Iterable[str],
    *,
    dtype: torch.dtype,
    uncast: AbstractSet[str] = frozenset(),
) -> Iterator[dict[str, StoredTensor]]:
    """Yields the tensors of `layers` and the wanted shared ones by module name; the files are open meanwhile.

    Args:
        shared: module names of the wanted tensors outside the layers; all others are skipped unread.
        dtype: floating-point tensors are cast to it as they are read.
        uncast: modules (one part of a dotted name) whose tensors keep their stored dtype.

    Raises:
        ModelError: code "bad_safetensors"; reading a tensor, "unsupported_dtype".
    """
    wanted = list(shared)
    result: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for path in paths:
            file = stack.enter_context(open_tensors(path))
            for name in file:
                local = layers.local(name) or _shared_name(name, wanted)
                if local is not None:
                    keep = not uncast.isdisjoint(name.split("."))
                    result[local] = StoredTensor(file, name, None if keep else dtype)
        yield result


def _shared_name(name: str, wanted: list[str]) -> str | None:
    if name in wanted:
        return name
    near = [candidate for candidate in wanted if _same_end(name, candidate)]
    if not near and is_head(name):  # families rename their head between releases
        near = [candidate for candidate in wanted if is_head(candidate)]
    return near[0] if len(near) == 1 else None


def _same_end(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def _copy(file: TensorFile, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    info = file[name]
    stored = _DTYPES.get(info.dtype)
    if stored is None:
        raise ModelError(f"tensor {name} is {info.dtype}", code="unsupported_dtype")
    target = dtype if dtype is not None and stored.is_floating_point else stored
    result = torch.empty(info.shape, dtype=target)
    flat = result.view(-1)
    values = _COPY_BYTES // stored.itemsize
    for first in range(0, flat.numel(), values):
        raw = file.raw(name)[first * stored.itemsize : (first + values) * stored.itemsize]
        flat[first : first + values] = torch.frombuffer(raw, dtype=stored)
        file.forget(name)
    return result
