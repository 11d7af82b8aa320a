"""Which of a checkpoint's tensors belong to which decoder layer, read off their names alone.

Every family numbers its decoder's layers somewhere ("model.layers.3.", "transformer.h.3.", "gpt_neox.layers.3."); the
container that holds the most tensors is the decoder, whatever it is called. All else is shared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from azu.errors import ModelError

__all__ = ["Layout", "find_layout", "is_first_stage_tensor", "is_head", "layer_index"]

_NUMBERED = re.compile(r"^(.*?)(\d+)\.")  # shortest: experts are numbered too, further inside
_HEADS = frozenset({"lm_head.weight", "embed_out.weight"})
_INPUT_SIDE = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings\w*|project_in)([._]|$)")


@dataclass(frozen=True, slots=True)
class Layout:
    """`prefix` is the decoder's container ("model.layers."), `layers[i]` layer i's tensors, `shared` all others."""

    prefix: str
    layers: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]


def find_layout(names: Iterable[str], n_layers: int) -> Layout:
    """Sorts tensor names into `n_layers` layers and the rest.

    Layers numbered `n_layers` and up (multi-token prediction heads) are left out: no forward pass uses them.

    Raises:
        ModelError: code "unknown_layout", where no container holds all the layers.
    """
    names = list(names)
    counts = Counter(match[1] for match in map(_NUMBERED.match, names) if match)
    if not counts:
        raise _unknown("no numbered layers among the tensor names")
    prefix = counts.most_common(1)[0][0]
    layers: list[list[str]] = [[] for _ in range(n_layers)]
    shared = []
    for name in names:
        index = layer_index(name, prefix)
        if index is None:
            shared.append(name)
        elif index < n_layers:
            layers[index].append(name)
    missing = [str(index) for index, layer in enumerate(layers) if not layer]
    if missing:
        raise _unknown(f"{prefix}* has no tensors for layers {', '.join(missing[:5])}")
    return Layout(prefix, tuple(tuple(sorted(layer)) for layer in layers), tuple(sorted(shared)))


def layer_index(name: str, prefix: str) -> int | None:
    """Returns the layer that a tensor belongs to, or None where it lies outside the container `prefix`."""
    match = _NUMBERED.match(name)
    return int(match[2]) if match and match[1] == prefix and len(match[2]) < 6 else None


def is_head(name: str) -> bool:
    """Returns whether a shared tensor is the output projection, which a tied model repeats the embedding for."""
    return name in _HEADS


def is_first_stage_tensor(name: str) -> bool:
    """Returns whether a shared tensor is used before the first layer; an estimate by name, for planning only."""
    return name not in _HEADS and _INPUT_SIDE.search(name) is not None


def _unknown(problem: str) -> ModelError:
    remedy = "Only decoder-only models that transformers knows can be published."
    return ModelError(f"unknown model layout: {problem}", code="unknown_layout", remedy=remedy)
