"""The safetensors parser believes nothing; the writer is deterministic and agrees with the reference library."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from azu.errors import InputError, ModelError
from azu.models.safetensors_file import (
    MAX_HEADER_BYTES,
    TensorSpec,
    open_foreign,
    open_tensors,
    parse_header,
    serialize,
)


@contextmanager
def only_bad_safetensors() -> Iterator[None]:
    """Whatever is inside may be refused, in this one way."""
    try:
        yield
    except ModelError as error:
        if error.code != "bad_safetensors":
            raise


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refused(data: bytes, size: int | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        parse_header(data, len(data) if size is None else size)
    assert caught.value.code == "bad_safetensors"
    return caught.value.message


def entry(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


arrays = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.tuples(st.sampled_from(["<f4", "<f2", "<i8", "|u1"]), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)
SAFE_NAMES = {"<f4": "F32", "<f2": "F16", "<i8": "I64", "|u1": "U8"}


@settings(max_examples=60)
@given(arrays)
def test_the_reference_library_reads_what_we_write(shapes: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.integers(0, 100, shape).astype(dtype) for name, (dtype, shape) in shapes.items()}
    specs = [TensorSpec(name, SAFE_NAMES[v.dtype.str], v.shape) for name, v in values.items()]
    data = b"".join(serialize(specs, lambda name: [values[name].tobytes()]))
    assert data == b"".join(serialize(reversed(specs), lambda name: [values[name].tobytes()]))
    read = safetensors.numpy.load(data)
    assert read.keys() == values.keys()
    assert all(np.array_equal(read[name], values[name]) for name in values)
    parsed = parse_header(data, len(data))
    assert {name: data[info.start : info.end] for name, info in parsed.items()} == {
        name: value.tobytes() for name, value in values.items()
    }


def test_we_read_what_the_reference_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    safetensors.numpy.save_file({"a": value, "b": value[0] * 2}, path, metadata={"format": "np"})
    with open_tensors(path) as file, open_foreign(path) as foreign:
        assert set(file) == {"a", "b"}
        assert file["a"].shape == (3, 4)
        assert dict(foreign) == dict(file)
        with file.raw("a") as raw:
            assert bytes(raw) == b"".join(foreign.chunks("a")) == value.tobytes()


def test_a_foreign_file_is_read_piece_by_piece(tmp_path: Path) -> None:
    path, size = tmp_path / "x.safetensors", 64 << 20
    path.write_bytes(packed({"a": entry([size // 4], 0, size)}))
    os.truncate(path, path.stat().st_size + size - 1)
    with path.open("ab") as file:
        file.write(b"z")
    tracemalloc.start()
    try:
        with open_foreign(path) as opened:
            lengths = [len(chunk) for chunk in opened.chunks("a")]
            assert sum(lengths) == size
            assert max(lengths) <= tracemalloc.get_traced_memory()[1] < 4 << 20, "however large the tensor"
            assert list(opened.chunks("a"))[-1].endswith(b"z")
    finally:
        tracemalloc.stop()


def test_a_foreign_file_that_gets_shorter(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1 << 20, dtype=np.float32)}, path)
    with open_foreign(path) as opened:
        chunks = opened.chunks("a")
        next(chunks)
        os.truncate(path, 1000)
        with pytest.raises(InputError) as caught:
            next(chunks)
    assert caught.value.code == "source_changed"


def test_data_is_aligned_and_buffers_must_fit() -> None:
    specs = [TensorSpec("a", "F32", (2,))]
    data = b"".join(serialize(specs, lambda _: [bytes(3), bytes(5)]))
    assert parse_header(data, len(data))["a"].start % 64 == 0
    for size in (0, 7, 9):
        with pytest.raises(ModelError):
            list(serialize(specs, lambda _, size=size: [bytes(size)]))  # type: ignore[misc]
    with pytest.raises(ModelError):
        list(serialize(specs * 2, lambda _: [bytes(8)]))


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with only_bad_safetensors():
        parse_header(data, len(data))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=4) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries({"dtype": values, "shape": values, "data_offsets": values}) | values


@given(st.dictionaries(st.text(max_size=4), entries, max_size=3) | values, st.binary(max_size=16))
def test_random_headers(header: Any, data: bytes) -> None:
    raw = packed(header, data)
    with only_bad_safetensors():
        tensors = parse_header(raw, len(raw))
        assert sum(info.end - info.start for info in tensors.values()) == len(data)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([1], 0, 4)}, b""),  # data missing
        ({"a": entry([1], 0, 4)}, bytes(5)),  # bytes nobody owns
        ({"a": entry([2], 0, 4)}, bytes(4)),  # shape too large
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),  # overlap
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),  # gap
        ({"a": entry([1 << 60], 0, 4)}, bytes(4)),
        ({"a": entry([1 << 32, 1 << 32], 0, 0)}, b""),
        ({"a": entry([-1], 4, 0)}, b""),
        ({"a": entry([True], 0, 4)}, bytes(4)),
        ({"a": entry([1.0], 0, 4)}, bytes(4)),
        ({"a": entry([1] * 9, 0, 4)}, bytes(4)),
        ({"a": entry([1], 0, 4, "Q4")}, bytes(4)),
        ({"a": entry([1], 0, 4, ["F32"])}, bytes(4)),
        ({"": entry([1], 0, 4)}, bytes(4)),
        ({"a": {**entry([1], 0, 4), "more": 1}}, bytes(4)),
        ({"a": 1}, b""),
        ([], b""),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        (b"{" * 100_000, b""),
        (b'{"a":NaN}', b""),
        (b"\xff\xfe", b""),
    ],
)
def test_broken_headers(header: Any, data: bytes) -> None:
    refused(packed(header, data))


def test_lengths_are_checked_before_anything_is_read() -> None:
    assert "longer than" in refused((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}")
    assert "longer than" in refused(b"\xff" * 8, size=1 << 62)
    assert "cut off" in refused((100).to_bytes(8, "little") + b"{}")
    assert "shorter" in refused(b"\0\0")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "absent"):
        for opened in (open_tensors, open_foreign):
            with pytest.raises(ModelError, match=name), opened(tmp_path / name):
                pass
