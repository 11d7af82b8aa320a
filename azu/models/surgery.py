"""How a model is cut to a stage.

It is built on the meta device, where it costs no memory; all layers but start..end are dropped, and every module
outside the layers that the range does not need is replaced by a stand-in. Then:

- start > 0: the family's forward runs as always (masks, positions, rotary tables), but a hook on the first kept layer
  swaps in the hidden states that arrived. Whatever came before was a stand-in, so nothing is computed twice.
- end < n_layers: a hook on the last kept layer takes its output and leaves the forward by an exception, which skips
  the final norm and whatever else a family does there.

Which modules come before the first layer is observed, not tabulated (`azu.models.observe`).

A stage can be cut again to a part of its layers while it is in use (`part_of`). The part has modules of its own, since
layers' indices, the config and the hooks differ, and shares every tensor with the stage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from azu.models.architecture import unsupported
from azu.models.observe import modules_before

__all__ = ["LastLayerDone", "part_of", "spliced", "state_names"]


class LastLayerDone(Exception):
    """Control flow, not an error: leaves the forward after the last kept layer, with its output [1, n, hidden]."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Incoming:
    """A hook of the first kept layer: swaps in the hidden states [1, n, hidden] that it takes next."""

    hidden: torch.Tensor

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.hidden}

    def __deepcopy__(self, _memo: object) -> _Incoming:
        return _Incoming()  # with hidden states of its own


class _StandIn(nn.Module):
    """Takes the place of a module of another stage: an embedding gives zero, anything else passes its input on."""

    def __init__(self, absent: nn.Module) -> None:
        super().__init__()
        self.embeds = isinstance(absent, nn.Embedding)

    def forward(self, inputs: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros((), device=inputs.device) if self.embeds else inputs


class _Layers(nn.ModuleList):
    """Most families take all of a model's layers as a slice, of which upstream makes another list at each pass."""

    def __getitem__(self, index: Any) -> Any:
        is_all = isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1)
        return self if is_all else super().__getitem__(index)


def spliced(family: type[PreTrainedModel], start: int, end: int, n_layers: int) -> Any:
    """A subclass of the family whose instances are cut down to the stage as soon as they are built."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        _cut(self, start, end, n_layers)

    # Under the family's own name: transformers looks conversions up by it.
    return type(family.__name__, (family,), {"__init__": __init__, "__module__": family.__module__})


def _cut(model: Any, start: int, end: int, n_layers: int) -> None:
    # We never pad; some families would search the ids for it at every step, and some forbid to unset it.
    object.__setattr__(model.config, "pad_token_id", None)
    path = _container(model, n_layers)
    layers = model.get_submodule(path)
    inside = f"{path}."
    outside = [
        name
        for name, module in model.named_modules()
        if not name.startswith(inside) and next(module.parameters(recurse=False), None) is not None
    ]
    before = modules_before(model, list(layers), outside)
    model.azu_container, model.azu_tied = inside, dict(model.all_tied_weights_keys)
    model.azu_before = [name for name in outside if name in before]
    model.azu_after = [name for name in outside if name not in before]
    _narrow(model, start, end)
    _forget_lengths(model)


def part_of(model: Any, start: int, end: int) -> Any:
    """Another model over the same tensors: of the layers that a stage holds, start..end, counted from its first one.

    Nothing is computed and no tensor copied; modules are, which takes about 50 KiB and 2 ms a layer.
    """
    layers = model.get_submodule(model.azu_container.removesuffix("."))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    memo |= {id(layer): None for index, layer in enumerate(layers) if not start <= index < end}
    part = copy.deepcopy(model, memo)
    _narrow(part, start, end)
    return part


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """All that a model holds, whether or not as parameters and buffers."""
    for module in model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            yield from (value for value in held.values() if isinstance(value, torch.Tensor))


def _narrow(model: Any, start: int, end: int) -> None:
    """Keeps layers start..end of those that are there, and of the rest what they need."""
    path = model.azu_container.removesuffix(".")
    if start > 0:
        _leave_out(model, model.azu_before)
        model.azu_before = []
    if end < len(model.get_submodule(path)):
        _leave_out(model, model.azu_after)
        model.azu_after = []
    _keep_layers(model, path, start, end)
    names = set(state_names(model))
    tied = model.azu_tied.items()
    model.all_tied_weights_keys = {name: source for name, source in tied if {name, source} <= names}


def _leave_out(model: Any, names: list[str]) -> None:
    gone: tuple[str, ...] = ()
    for name in names:
        if not name.startswith(gone):  # a module goes with all that is in it
            model.set_submodule(name, _StandIn(model.get_submodule(name)))
            gone += (f"{name}.",)


def _container(model: Any, n_layers: int) -> str:
    """The decoder's list of layers: of all lists that long, the one with the most weights in it."""
    lists: dict[str, int] = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    if not lists:
        raise unsupported(type(model).__name__, f"it has no list of {n_layers} layers")
    return max(lists, key=lists.__getitem__)  # the outermost, where one is all that another holds


def _keep_layers(model: Any, path: str, start: int, end: int) -> None:
    layers = model.get_submodule(path)
    kept = _Layers(layers[start:end])
    model.set_submodule(path, kept)
    for module in kept.modules():
        for name in ("layer_idx", "layer_id"):  # they index the stage's own cache
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) - start)
    types = getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers = end - start
    if types is not None:
        _set_layer_types(model.config, types[start:end])
    if start > 0:
        # Not the model itself: in a circle with its layer, it would stay in memory after the last use of it.
        model.azu_incoming = _Incoming()
        kept[0].register_forward_pre_hook(model.azu_incoming, with_kwargs=True)
    if end < len(layers):
        kept[-1].register_forward_hook(_leave)


def _forget_lengths(model: Any) -> None:
    """Dynamic NTK rotary tables grow with the longest job that they saw; a stage's jobs must not change each other."""

    def forget(module: Any, *_: object) -> None:
        kinds = module.rope_type if isinstance(module.rope_type, dict) else ()
        for prefix in ("", *(f"{kind}_" for kind in kinds)):
            if hasattr(module, f"{prefix}original_inv_freq"):
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        if "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.register_forward_pre_hook(forget)


def _set_layer_types(config: Any, types: list[str]) -> None:
    try:
        config.layer_types = types
    except AttributeError:  # a property, which would count the stage's layers from the model's first
        name = config.attribute_map.get("layer_types", "layer_types")
        config.__class__ = type(type(config).__name__, (type(config),), {name: types})


def _leave(_module: nn.Module, _args: object, output: Any) -> None:
    raise LastLayerDone(output if isinstance(output, torch.Tensor) else output[0])


def state_names(model: Any) -> list[str]:
    """Every name in the module's state dict, tied ones included."""
    return list(model.state_dict().keys())
