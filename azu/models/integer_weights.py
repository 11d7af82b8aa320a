"""Weights as integers, by torchao. Imported only where a stage is loaded in int8 or int4: it takes seconds."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import functional
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization import Int4TilePackedTo4dTensor, Int8Tensor
from torchao.quantization.granularity import PerRow

from azu.models.weight_formats import INT4_GROUP, held_format, is_packable
from azu.wire.tensors import WeightFormat

__all__ = ["integer_weight"]

# From here on torch's kernel for packed int8 on a CPU is slower than one cast of the weight and a bfloat16 product.
_MANY_ROWS = 16


class CpuInt8Tensor(Int8Tensor):  # type: ignore[misc]  # torchao has no annotations
    """torchao's int8 weight [out, in], with a kernel that reads the integers as they are.

    torchao's own product casts the whole weight at each call, and leaves it to torch.compile to fuse that.
    """


@CpuInt8Tensor.implements_torch_function(functional.linear)  # type: ignore[untyped-decorator]
def _linear(_function: object, _types: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return _int8_linear(*args, **kwargs)


def _int8_linear(inputs: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows: torch.Tensor = inputs.reshape(-1, inputs.shape[-1])
    scale = weight.scale.reshape(-1)
    if len(rows) < _MANY_ROWS and is_packable(*weight.shape):
        result: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), weight.qdata, scale)
    else:
        result = torch.mm(rows, weight.qdata.to(rows.dtype).t()) * scale
    result = result.view(*inputs.shape[:-1], -1)
    return result if bias is None else result + bias


def integer_weight(weight: torch.Tensor, wanted: WeightFormat) -> torch.Tensor:
    """A linear layer's weight [out, in] (bfloat16, on the device that will compute) in "int8" or "int4"."""
    rows, columns = weight.shape
    on_cpu = weight.device.type == "cpu"
    held: Any
    if held_format(rows, columns, wanted) == "int4":
        held = (Int4OpaqueTensor if on_cpu else Int4TilePackedTo4dTensor).from_hp(weight, [1, INT4_GROUP])
    else:
        held = Int8Tensor.from_hp(weight, granularity=PerRow())
        if on_cpu:
            scale = held.scale.to(weight.dtype)
            held = CpuInt8Tensor(held.qdata, scale, held.block_size, weight.dtype, zero_point=held.zero_point)
    return cast(torch.Tensor, held)
