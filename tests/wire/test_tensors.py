"""Tensor headers: what they promise is checked before a byte is used."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import ProtocolError
from azu.wire.document import encode_cbor
from azu.wire.tensors import ACTIVATIONS, DTYPES, ITEMSIZE, WEIGHT_FORMATS, TensorHeader

shapes = st.lists(st.integers(1, 2**31), min_size=1, max_size=4).map(tuple)


@given(st.sampled_from(DTYPES), shapes)
def test_round_trip_and_size(dtype: Any, shape: tuple[int, ...]) -> None:
    header = TensorHeader(dtype=dtype, shape=shape)
    assert TensorHeader.from_cbor(header.to_cbor()) == header
    assert header.nbytes == prod(shape) * ITEMSIZE[dtype]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float64", [1]), ("int8", [1]), ("", [1]), (None, [1]),
        ("float32", []), ("float32", [0]), ("float32", [-1]), ("float32", [1.0]), ("float32", ["1"]),
        ("float32", [True]), ("float32", [2**31 + 1]), ("float32", [1] * 5), ("float32", 4), ("float32", b"\x01"),
    ],
)  # fmt: skip
def test_no_other_dtype_or_shape(dtype: Any, shape: Any) -> None:
    with pytest.raises(ProtocolError):
        TensorHeader.from_cbor(encode_cbor({"dtype": dtype, "shape": shape}))


def test_every_format_of_weights_has_activations_that_can_travel() -> None:
    assert set(ACTIVATIONS) == set(WEIGHT_FORMATS)
    assert set(ACTIVATIONS.values()) == set(DTYPES)
    assert all(ACTIVATIONS[dtype] == dtype for dtype in DTYPES)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    slack=st.sampled_from([-2, -1, 0, 0, 0, 1]),
)
def test_check_accepts_exactly_what_the_stage_expects(dtype: Any, shape: tuple[int, ...], slack: int) -> None:
    header = TensorHeader(dtype=dtype, shape=shape)
    length = header.nbytes + slack
    fits = dtype == "float16" and len(shape) == 2 and shape[1] == 4 and shape[0] <= 3 and slack == 0
    if fits:
        assert header.check(length, dtype="float16", width=4, max_rows=3) == shape[0]
    else:
        with pytest.raises(ProtocolError) as raised:
            header.check(length, dtype="float16", width=4, max_rows=3)
        assert raised.value.code == "bad_tensor"


def test_every_size_in_the_table_is_the_size_that_torch_uses() -> None:
    import torch

    assert {name: getattr(torch, name).itemsize for name in DTYPES} == ITEMSIZE
