"""Safetensors files without torch: a parser that trusts nothing, two readers and a deterministic writer.

The format: 8 bytes of little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data.
Headers come from hubs and peers, so every number is bounded before anything is allocated or multiplied.

Files of the layer store, which nobody changes, are mapped. A file that belongs to somebody else is read piece by piece:
where a mapped one becomes shorter, the system ends the process.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from azu.errors import ModelError
from azu.models.source_errors import source_changed, unreadable_source

__all__ = [
    "ITEM_BYTES",
    "MAX_HEADER_BYTES",
    "ForeignFile",
    "TensorFile",
    "TensorInfo",
    "TensorSpec",
    "open_foreign",
    "open_tensors",
    "parse_header",
    "serialize",
]

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_TENSORS = 1_000_000  # DeepSeek-V3's unfused experts are about 90,000
MAX_DIMENSIONS = 8
MAX_NAME_CHARS = 1024
_PREFIX_BYTES = 8
_READ_BYTES = 1 << 20  # of a foreign file at a time
_ALIGNMENT = 64  # data starts on a cache line, so that a mapped tensor is as fast as an allocated one

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
    | {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in a file: safetensors dtype, shape, and bytes start..end counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(prefix: bytes | memoryview, file_size: int) -> dict[str, TensorInfo]:
    """Parses the header of a safetensors file of `file_size` bytes; `prefix` holds at least the whole header.

    Returns:
        Tensors by name, in the order of their data.

    Raises:
        ModelError: code "bad_safetensors", for anything but a well-formed header whose tensors fill the file exactly.
    """
    length = header_length(prefix, file_size)
    header = _load_json(bytes(prefix[_PREFIX_BYTES : _PREFIX_BYTES + length]))
    header.pop("__metadata__", None)
    _require(len(header) <= MAX_TENSORS, "too many tensors")
    data_start = _PREFIX_BYTES + length
    tensors = [_parse_tensor(name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    position = data_start
    for info in tensors:
        _require(info.start == position, f"tensor {info.name!r} leaves a gap or overlaps another")
        position = info.end
    _require(position == file_size, "the tensors do not fill the file")
    return {info.name: info for info in tensors}


def header_length(prefix: bytes | memoryview, file_size: int) -> int:
    """Returns the header's length in bytes (without the 8 that say so), checked against the file and the limit."""
    _require(file_size >= _PREFIX_BYTES and len(prefix) >= _PREFIX_BYTES, "shorter than its length field")
    length = int.from_bytes(bytes(prefix[:_PREFIX_BYTES]), "little")
    _require(length <= MAX_HEADER_BYTES, f"its header is longer than {MAX_HEADER_BYTES} bytes")
    _require(_PREFIX_BYTES + length <= min(file_size, len(prefix)), "its header is cut off")
    return length


def _load_json(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, endless integers
        raise _bad("its header is not JSON") from error
    _require(isinstance(value, dict), "its header is not an object")
    result: dict[str, Any] = value
    return result


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    _require(len(result) == len(pairs), "its header repeats a name")
    return result


def _refuse_constant(constant: str) -> Any:
    raise _bad(f"its header holds {constant}")


def _parse_tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    _require(0 < len(name) <= MAX_NAME_CHARS, "a tensor's name is empty or too long")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"entry {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _require(isinstance(dtype, str) and dtype in ITEM_BYTES, f"tensor {name!r} has an unknown dtype")
    _require(isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS, f"tensor {name!r} has a bad shape")
    _require(isinstance(offsets, list) and len(offsets) == 2, f"tensor {name!r} has bad offsets")
    # 2**60 exceeds any disk; a product of eight such numbers is still a cheap integer, which the size check refuses.
    in_range = all(type(number) is int and 0 <= number < 1 << 60 for number in [*shape, *offsets])
    _require(in_range, f"tensor {name!r} has a number out of range")
    size = ITEM_BYTES[dtype]
    for dimension in shape:
        size *= dimension
    _require(offsets[1] - offsets[0] == size, f"tensor {name!r} does not have the size of its shape")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _bad(problem)


def _bad(problem: str) -> ModelError:
    remedy = "Fetch or convert the file again."
    return ModelError(f"bad safetensors file: {problem}", code="bad_safetensors", remedy=remedy)


class _Tensors(Mapping[str, TensorInfo]):
    """A file's tensors by name."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class TensorFile(_Tensors):
    """A memory-mapped safetensors file: a mapping of tensor name to `TensorInfo`, with the raw bytes in reach."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self._mapped = mapped
        self._view = memoryview(mapped)
        try:
            super().__init__(parse_header(self._view, len(self._view)))
        except BaseException:
            self._view.release()  # else the mapping could not be closed
            raise

    def raw(self, name: str) -> memoryview:
        """Returns the tensor's bytes as a view into the mapping; release it before the file closes."""
        info = self._tensors[name]
        return self._view[info.start : info.end]

    def forget(self, name: str) -> None:
        """Lets the system drop the pages of a tensor that was read, which else count as this process's memory."""
        info = self._tensors[name]
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, start, info.end - start)

    def release(self) -> None:
        """Drops the view of the mapping; `open_tensors` calls it."""
        self._view.release()


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Maps a safetensors file for reading; private pages, so that torch may take it for writable memory.

    Raises:
        ModelError: code "bad_safetensors", where it cannot be read or its header does not hold.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        raise _bad(f"{path.name} cannot be mapped ({error})") from error
    try:
        tensors = TensorFile(path, mapped)
        try:
            yield tensors
        finally:
            tensors.release()
    finally:
        with suppress(BufferError):  # a traceback may still hold a view; the mapping then ends with it
            mapped.close()


class ForeignFile(_Tensors):
    """A safetensors file that anybody may change while it is read; a mapping of tensor name to `TensorInfo`."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._descriptor = file.fileno()
        size = os.fstat(self._descriptor).st_size
        start = os.pread(self._descriptor, _PREFIX_BYTES, 0)
        length = int.from_bytes(start, "little")  # parse_header judges it
        rest = os.pread(self._descriptor, length, _PREFIX_BYTES) if length <= min(size, MAX_HEADER_BYTES) else b""
        super().__init__(parse_header(start + rest, size))

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yields the tensor's bytes in pieces of up to 1 MiB.

        Raises:
            InputError: code "source_changed", where the file has become shorter; "unreadable_source".
        """
        info = self._tensors[name]
        position = info.start
        while position < info.end:
            try:
                chunk = os.pread(self._descriptor, min(_READ_BYTES, info.end - position), position)
            except OSError as error:
                raise unreadable_source(self.path, error) from error
            if not chunk:
                raise source_changed(self.path)
            position += len(chunk)
            yield chunk


@contextmanager
def open_foreign(path: Path) -> Iterator[ForeignFile]:
    """Opens a safetensors file for reading piece by piece.

    Raises:
        ModelError: code "bad_safetensors", where it cannot be read or its header does not hold.
    """
    with ExitStack() as stack:
        try:
            opened = ForeignFile(path, stack.enter_context(path.open("rb")))
        except OSError as error:
            raise _bad(f"{path.name} cannot be read ({error})") from error
        except ModelError as error:
            raise ModelError(f"{path.name}: {error.message}", code=error.code, remedy=error.remedy) from error
        yield opened


def serialize(
    specs: Iterable[TensorSpec], read: Callable[[str], Iterable[bytes | memoryview]]
) -> Iterator[bytes | memoryview]:
    """Yields the chunks of a safetensors file, tensors sorted by name; `read` gives one tensor's bytes, in pieces.

    The bytes depend on the tensors only, so that publishing the same model twice gives the same digests.

    Raises:
        ModelError: code "bad_safetensors", where `read` returns another size than dtype and shape ask for.
    """
    ordered = sorted(specs, key=lambda spec: spec.name)
    header: dict[str, dict[str, object]] = {}
    position = 0
    for spec in ordered:
        entry: dict[str, object] = {"dtype": spec.dtype, "shape": list(spec.shape)}
        entry["data_offsets"] = [position, position + spec.nbytes]
        _require(spec.name not in header, f"two tensors are called {spec.name!r}")
        _parse_tensor(spec.name, entry, 0)
        header[spec.name] = entry
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-(_PREFIX_BYTES + len(text)) % _ALIGNMENT)
    yield len(text).to_bytes(_PREFIX_BYTES, "little") + text
    for spec in ordered:
        left = spec.nbytes
        for chunk in read(spec.name):
            data = memoryview(chunk).cast("B")
            left -= data.nbytes
            yield data
        _require(left == 0, f"tensor {spec.name!r} does not have the size of its shape")
