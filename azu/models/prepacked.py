"""Linear layers whose weight oneDNN has reordered once, on a CPU, into the blocks that its kernels read.

For a plain 16-bit weight oneDNN does that at every call, which costs as much as the product itself. Here alone is
torch's private API used: `torch.ops.mkldnn`, which torch.compile packs a frozen model's linear layers with. What it is
asked for is tried first (`can_prepack`); where that fails, weights stay plain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import nn

__all__ = ["LINEAR", "PrepackedLinear", "can_prepack", "layers_pay", "prepack", "product"]

# Classes that do no more than multiply by their weight and add a bias. Other subclasses of nn.Linear do.
LINEAR = frozenset({"Linear", "FalconLinear"})
# The rows that oneDNN chooses its blocks for. With 1 it is faster by a few percent for one row, and slower by a third
# for 256; from 16 on it makes no difference.
_ROWS = 16
# Weights [out, in] that are tried: up and down projections of a small model, as many as do not stay in a CPU's caches.
_TRIED, _COPIES, _TURNS = ((1536, 576), (1536, 576), (576, 1536)), 5, 4


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
        return product(inputs, self._parameters["weight"], self._parameters["bias"])

    def _plain_weight(self) -> nn.Parameter:
        plain = nn.Parameter(self._dense(), requires_grad=False)
        self._parameters["weight"] = plain
        self.__class__ = self.was  # type: ignore[assignment]  # what it was before `adopt`
        return plain

    def _dense(self) -> torch.Tensor:
        return cast(torch.Tensor, self._parameters["weight"]).to_dense()

    weight = property(_plain_weight)


@lru_cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU multiply by prepacked weights of this dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # no annotation upstream
        return False
    return _apart(partial(_multiplies, dtype))


@lru_cache
def layers_pay() -> bool:
    """Whether layers in float32 are faster prepacked on this CPU, for a token alone and for several: tried, in a tenth
    of a second, since it depends on what library multiplies by plain ones and on the CPU (docs/performance.md).
    """
    return can_prepack(torch.float32) and _apart(_is_faster)


def _apart(call: Callable[[], bool]) -> bool:
    """In a thread that ends: GNU OpenMP gives each thread that computes a team of its own, and no team more than a
    moment's spinning while all of them have more threads than there are cores. That nearly halves a pass's speed.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@torch.inference_mode()
def _is_faster() -> bool:
    plain = [torch.ones(shape) for shape in _TRIED for _ in range(_COPIES)]
    packed = [prepack(weight) for weight in plain]
    for rows in (1, _ROWS):
        inputs = [torch.ones(rows, weight.shape[1]) for weight in plain]
        # By turns, so that what else the machine does hits both alike.
        turns = [
            (_seconds(product, inputs, packed), _seconds(nn.functional.linear, inputs, plain)) for _ in range(_TURNS)
        ]
        if min(one for one, _ in turns) > min(other for _, other in turns):
            return False
    return True


def _seconds(product: Callable[..., torch.Tensor], inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    for each, weight in zip(inputs, weights, strict=True):
        product(each, weight, None)
    return time.perf_counter() - started


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
        return product(inputs, prepack(weight), bias).equal(expected)
    except (AttributeError, RuntimeError, TypeError):
        return False


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight [out, in] in oneDNN's own layout: an opaque tensor of the same shape and dtype."""
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS))


def product(inputs: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """Inputs [..., in] by a prepacked weight [out, in]: [..., out]."""
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], ""))
