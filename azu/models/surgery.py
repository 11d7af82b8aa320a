"""How a model is cut to a stage.

It is built on the meta device, where it costs no memory; all layers but start..end are dropped, and every module
outside the layers that the range does not need is replaced by a stand-in. Then:

- start > 0: the family's forward runs as always (masks, positions, rotary tables), but a hook on the first kept layer
  swaps in the hidden states that arrived. Whatever came before was a stand-in, so nothing is computed twice.
- end < n_layers: a hook on the last kept layer takes its output and leaves the forward by an exception, which skips
  the final norm and whatever else a family does there.

Which modules come before the first layer is observed, not tabulated: one forward on the meta device notes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from azu.errors import ModelError

__all__ = ["LastLayerDone", "spliced", "state_names"]


class LastLayerDone(Exception):
    """Control flow, not an error: leaves the forward after the last kept layer, with its output [1, n, hidden]."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _FirstLayerReached(Exception):
    """Control flow, not an error: ends the observing forward."""


class _StandIn(nn.Module):
    """Takes the place of a module of another stage: an embedding gives zero, anything else passes its input on."""

    def __init__(self, absent: nn.Module) -> None:
        super().__init__()
        self.embeds = isinstance(absent, nn.Embedding)

    def forward(self, inputs: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros((), device=inputs.device) if self.embeds else inputs


def spliced(family: type[PreTrainedModel], start: int, end: int, n_layers: int) -> Any:
    """A subclass of the family whose instances are cut down to the stage as soon as they are built."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        _cut(self, start, end, n_layers)

    # Under the family's own name: transformers looks conversions up by it.
    return type(family.__name__, (family,), {"__init__": __init__, "__module__": family.__module__})


def _cut(model: Any, start: int, end: int, n_layers: int) -> None:
    model.config.pad_token_id = None  # we never pad; some families would search the ids for it at every step
    path = _container(model, n_layers)
    layers = model.get_submodule(path)
    inside = f"{path}."
    outside = [
        name
        for name, module in model.named_modules()
        if not name.startswith(inside) and next(module.parameters(recurse=False), None) is not None
    ]
    before = _modules_before(model, layers[0], outside)
    tied = dict(model.all_tied_weights_keys)
    for name in outside:
        if not (start == 0 if name in before else end == n_layers):
            model.set_submodule(name, _StandIn(model.get_submodule(name)))
    _keep_layers(model, path, start, end, n_layers)
    names = set(state_names(model))
    model.azu_container, model.azu_tied = inside, tied
    model.all_tied_weights_keys = {name: source for name, source in tied.items() if {name, source} <= names}


def _container(model: Any, n_layers: int) -> str:
    lists: list[str] = [
        name
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if not lists:
        problem = f"{type(model).__name__} has no list of {n_layers} layers"
        raise ModelError(problem, code="unsupported_architecture")
    return lists[0]  # the outermost: named_modules walks from the root


def _modules_before(model: Any, first: nn.Module, names: list[str]) -> set[str]:
    """Which of the named modules the family's forward calls before its first layer, observed on the meta device."""
    seen: set[str] = set()

    def reached(*_: object) -> None:
        raise _FirstLayerReached

    def watch(name: str) -> Any:
        return model.get_submodule(name).register_forward_pre_hook(lambda *_: seen.add(name))

    handles = [first.register_forward_pre_hook(reached), *map(watch, names)]
    try:
        with torch.device("meta"), torch.no_grad():
            # With a cache, since without one transformers looks at the values for packed sequences.
            model.base_model(input_ids=torch.zeros((1, 2), dtype=torch.int64), past_key_values=DynamicCache())
    except _FirstLayerReached:
        return seen
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(f"{type(model).__name__} does not run its layers", code="unsupported_architecture")


def _keep_layers(model: Any, path: str, start: int, end: int, n_layers: int) -> None:
    kept = model.get_submodule(path)[start:end]
    model.set_submodule(path, kept)
    for module in kept.modules():
        for name in ("layer_idx", "layer_id"):  # they index the stage's own cache
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) - start)
    types = getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers = end - start
    if types is not None:
        model.config.layer_types = types[start:end]
    if start > 0:
        kept[0].register_forward_pre_hook(lambda _, args, kwargs: _swap(model, args, kwargs), with_kwargs=True)
    if end < n_layers:
        kept[-1].register_forward_hook(_leave)


def _swap(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (model.azu_incoming, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": model.azu_incoming}


def _leave(_module: nn.Module, _args: object, output: Any) -> None:
    raise LastLayerDone(output if isinstance(output, torch.Tensor) else output[0])


def state_names(model: Any) -> list[str]:
    """Every name in the module's state dict, tied ones included."""
    return list(model.state_dict().keys())
