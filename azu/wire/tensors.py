"""Tensors on the wire: dtype and shape in the header, little-endian row-major bytes as the body.

How a stage holds its weights and what it computes in and sends are two things: a `WeightFormat` says the first, and the
second follows from it (`ACTIVATIONS`), so that stages that agree on the format agree on every byte between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import Field

from azu.errors import ProtocolError
from azu.wire.document import Document, Tuple

__all__ = ["ACTIVATIONS", "DTYPES", "ITEMSIZE", "WEIGHT_FORMATS", "DType", "TensorHeader", "WeightFormat"]

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DType)
ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

WeightFormat = Literal["float32", "float16", "bfloat16", "int8", "int4"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
# What activations and KV caches are in. bfloat16 for integer weights: it is what GPUs compute in, and torch's kernels
# for integer weights on a CPU take 13 to 30 times as long with float32 (docs/performance.md).
ACTIVATIONS: Mapping[WeightFormat, DType] = MappingProxyType(
    {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "bfloat16", "int4": "bfloat16"}
)


class TensorHeader(Document):
    """What the bytes of a frame's body are."""

    dtype: DType
    shape: Annotated[Tuple[Annotated[int, Field(ge=1, le=2**31)]], Field(min_length=1, max_length=4)]

    @property
    def nbytes(self) -> int:
        """Bytes that a tensor of this dtype and shape has."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def check(self, body_length: int, *, dtype: str, width: int, max_rows: int) -> int:
        """Check a [rows, width] activation tensor against what this stage expects, and return its rows.

        Raises:
            ProtocolError: dtype, shape or body length is not what it has to be.
        """
        if self.dtype != dtype or len(self.shape) != 2 or self.shape[1] != width:
            raise ProtocolError(f"expected {dtype}[n, {width}], got {self.dtype}{list(self.shape)}", code="bad_tensor")
        if self.shape[0] > max_rows:
            raise ProtocolError(f"{self.shape[0]} rows in a tensor, at most {max_rows} allowed", code="bad_tensor")
        if body_length != self.nbytes:
            raise ProtocolError(f"a tensor of {self.nbytes} bytes came with {body_length}", code="bad_tensor")
        return self.shape[0]
