"""Watches a family's forward on the meta device: what it runs before its layers, and whether it can be cut at all.

A cut needs a plain chain: each layer gets the last one's output as it is, once, in order, and nothing else that depends
on the tokens but positions and masks. Whether that holds is seen by running the forward with stand-ins for the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from azu.models.architecture import unsupported

__all__ = ["modules_before"]


class _Observed(Exception):
    """Control flow, not an error: ends the observing forward after the last layer."""


class _NotAChain(Exception):
    """Says in what way a forward is no plain chain of layers."""


def modules_before(model: Any, layers: list[nn.Module], names: list[str]) -> set[str]:
    """Returns which of the named modules the forward calls before its first layer.

    Args:
        model: the whole model, on the meta device.
        names: of modules outside the layers.

    Raises:
        ModelError: code "unsupported_architecture", where the layers are no plain chain.
    """
    reason = ""
    for as_tuple in (False, True):  # what a layer returns differs between families; the wrong guess breaks the chain
        watch = _Watch(as_tuple=as_tuple)
        try:
            with watch.installed(model, layers, names), _plain_rotary(model), torch.device("meta"), torch.enable_grad():
                # With a cache, since without one transformers looks at the values for packed sequences.
                model(input_ids=torch.zeros((1, 2), dtype=torch.int64), past_key_values=watch.cache, use_cache=True)
        except _Observed:
            return watch.before
        except _NotAChain as error:
            reason = reason or str(error)
        except Exception as error:  # a family's forward may need values, which the meta device has not
            reason = reason or f"its forward cannot be followed ({type(error).__name__}: {str(error)[:100]})"
        else:
            reason = reason or "its forward does not run its layers"
    raise unsupported(type(model).__name__, reason)


class _Watch:
    """Stand-ins for the layers that note what reaches them."""

    def __init__(self, *, as_tuple: bool) -> None:
        self.as_tuple = as_tuple
        self.before: set[str] = set()
        self.cache = DynamicCache()
        self._done = 0
        self._last: torch.Tensor | None = None

    @contextmanager
    def installed(self, model: Any, layers: list[nn.Module], names: list[str]) -> Iterator[None]:
        handles = [model.get_submodule(name).register_forward_pre_hook(self._outside(name)) for name in names]
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = self._layer(index, len(layers))
        try:
            yield
        finally:
            for layer in layers:
                del layer.__dict__["forward"]
            for handle in handles:
                handle.remove()

    def _outside(self, name: str) -> Callable[..., None]:
        def called(*_: object) -> None:
            if self._done:
                raise _NotAChain(f"it runs {name} between its layers")
            self.before.add(name)

        return called

    def _layer(self, index: int, count: int) -> Callable[..., object]:
        def forward(*args: Any, **kwargs: Any) -> object:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if index != self._done:
                raise _NotAChain("it does not run its layers once each, in order")
            if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or (index and hidden is not self._last):
                raise _NotAChain("its layers do not take the last one's output as it is")
            rest = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
            if not any(value is self.cache for value in rest):
                raise _NotAChain("its layers do not keep their state in the cache that they are given")
            if any(tensor.requires_grad for tensor in _tensors(rest)):
                raise _NotAChain("its layers take more that is computed from the tokens than the last one's output")
            self._done += 1
            if self._done == count:
                raise _Observed
            self._last = hidden * 1
            return (self._last, None) if self.as_tuple else self._last

        return forward


@contextmanager
def _plain_rotary(model: Any) -> Iterator[None]:
    """Makes plain rotary tables of those that depend on the positions' values, which the meta device has not."""
    kinds = [(module, module.rope_type) for module in model.modules() if hasattr(module, "rope_type")]
    for module, kind in kinds:
        module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    try:
        yield
    finally:
        for module, kind in kinds:
            module.rope_type = kind


def _tensors(values: list[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))
        elif isinstance(value, list | tuple):
            yield from _tensors(list(value))
