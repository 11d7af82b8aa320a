"""Linear layers whose weight oneDNN has reordered once, on a CPU, into the blocks that its kernels read.

For a plain 16-bit weight oneDNN does that at every call, which costs as much as the product itself. Here alone is
torch's private API used: `torch.ops.mkldnn`, which torch.compile packs a frozen model's linear layers with. What it is
asked for is tried first (`can_prepack`); where that fails, weights stay plain.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

__all__ = ["LINEAR", "PrepackedLinear", "can_prepack", "pays", "prepack"]

# Classes that do no more than multiply by their weight and add a bias. Other subclasses of nn.Linear do.
LINEAR = frozenset({"Linear", "FalconLinear"})
# The rows that oneDNN chooses its blocks for. With 1 it is faster by a few percent for one row, and slower by a third
# for 256; from 16 on it makes no difference.
_ROWS = 16


class PrepackedLinear(nn.Linear):
    """What a linear layer becomes once its weight is oneDNN's (`adopt`).

    A family that reads `weight` itself, without a call of the layer, gets a plain one; and the layer is plain from
    then on.
    """

    was: type[nn.Module]

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Turn a layer that holds a prepacked weight into this class, where it is: hooks and references stay."""
        module.was = type(module)  # type: ignore[assignment]  # a plain attribute
        module.__class__ = cls

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _product(inputs, self._parameters["weight"], self._parameters["bias"])

    def _plain_weight(self) -> nn.Parameter:
        held = cast(nn.Parameter, self._parameters["weight"])
        plain = nn.Parameter(held.to_dense(), requires_grad=False)
        self._parameters["weight"] = plain
        self.__class__ = self.was  # type: ignore[assignment]  # what it was before `adopt`
        return plain

    weight = property(_plain_weight)


def pays(dtype: torch.dtype, *, head: bool) -> bool:
    """Whether a weight of this dtype is better prepacked: measured, see docs/performance.md, "Packed weights".

    In bfloat16 always. In float32 and float16 a layer loses at one row what it gains at more; the head, the largest
    matrix by far, takes half the time from four rows on and loses little at one.
    """
    return head or dtype == torch.bfloat16


@lru_cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU multiply by prepacked weights of this dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # no annotation upstream
        return False
    # In a thread that ends: GNU OpenMP gives each thread that computes a team of its own, and no team more than a
    # moment's spinning while all of them have more threads than there are cores. That nearly halves a pass's speed.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_multiplies, dtype).result()


def _multiplies(dtype: torch.dtype) -> bool:
    ops: Any = torch.ops.mkldnn
    try:
        if dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
            return False
        if dtype == torch.float16 and not ops._is_mkldnn_fp16_supported():
            return False
        weight = torch.eye(32, 64, dtype=dtype)
        bias, inputs = weight[:, 0].clone(), weight[:5].clone()
        expected = nn.functional.linear(inputs, weight, bias)
        return _product(inputs, prepack(weight), bias).equal(expected)
    except (AttributeError, RuntimeError, TypeError):
        return False


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight [out, in] in oneDNN's own layout: an opaque tensor of the same shape and dtype."""
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS))


def _product(inputs: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], ""))
