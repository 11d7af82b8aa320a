"""Prepacked linear layers that multiply the same input, as one product: queries, keys and values; gates and ups.

One product of three weights takes less time than three, above all with several threads, which have to meet after each
(docs/performance.md). The first of them that is called computes for all, and the others take their columns. Who is
called with another input computes anew, so that a family in which they do not belong together is slower, not wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from azu.models.prepacked import PrepackedLinear, prepack, product

__all__ = ["SiblingLinear", "join_siblings"]

# As nearly all families call them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Siblings:
    """What several layers, of so many outputs each, share. The weight is each layer's own parameter, the same one."""

    def __init__(self, sizes: list[int], bias: torch.Tensor | None) -> None:
        self.sizes = sizes
        self.bias = bias
        self._inputs: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def output(self, index: int, inputs: torch.Tensor, weight: Any) -> torch.Tensor:
        """That of one layer: [..., size], a view of all of them."""
        if inputs is not self._inputs:
            self._inputs, self._outputs = inputs, torch.split(product(inputs, weight, self.bias), self.sizes, -1)
        output = self._outputs[index]
        if index == len(self.sizes) - 1:  # nothing is held until the next pass
            self._inputs, self._outputs = None, ()
        return output

    def rows(self, index: int) -> slice:
        """Where one layer's weight lies in that of all."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


class SiblingLinear(PrepackedLinear):
    """A prepacked layer whose weight is part of a larger one."""

    siblings: _Siblings
    index: int

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.siblings.output(self.index, inputs, self._parameters["weight"])

    def _dense(self) -> torch.Tensor:
        return super()._dense()[self.siblings.rows(self.index)].clone()


def join_siblings(model: nn.Module, note_freed: Callable[[int], None]) -> None:
    """Join the prepacked layers of a model that are called with the same input.

    Args:
        note_freed: called with the bytes of weights that are held otherwise now.
    """
    for module in model.modules():
        for names in _TOGETHER:
            found = [module._modules.get(name) for name in names]
            if _belong_together(found):
                note_freed(_join(found))


def _belong_together(layers: list[Any]) -> bool:
    if not all(type(layer) is PrepackedLinear for layer in layers):
        return False
    return len({(layer.in_features, layer.bias is None, layer._parameters["weight"].dtype) for layer in layers}) == 1


def _join(layers: list[Any]) -> int:
    """Give layers one weight. Of theirs, no more than one is held twice at a time. Returns the bytes of them all."""
    sizes = [layer.out_features for layer in layers]
    first = layers[0]
    dense = torch.empty((sum(sizes), first.in_features), dtype=first._parameters["weight"].dtype)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    siblings = _Siblings(sizes, torch.cat(biases) if biases else None)
    for index, layer in enumerate(layers):
        dense[siblings.rows(index)] = layer._dense()
        layer._parameters["weight"] = None
    weight = nn.Parameter(prepack(dense), requires_grad=False)
    for index, layer in enumerate(layers):
        layer._parameters["weight"] = weight
        layer.__class__ = SiblingLinear
        layer.siblings, layer.index = siblings, index
    return dense.nbytes
