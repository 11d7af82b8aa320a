"""What a source's tensors make, from their names and shapes alone: for the publisher, who cuts them, and for planners.

Pure, and no weight is read: a planner needs no more than a hub's headers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from azu.errors import ModelError
from azu.models.facts import ConfigFacts, read_facts
from azu.models.layout import find_layout, is_head
from azu.models.manifest import DTYPE_BYTES, PIECE_BYTES, Blob, Manifest, Weights
from azu.models.safetensors_file import TensorSpec
from azu.models.weight_formats import is_router

__all__ = ["Inventory", "outline", "take_inventory", "weights_of"]

_NOTHING = hashlib.sha256().hexdigest()
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class Inventory:
    """A model by its files-to-be: `layers[i]` and `shared` are names of tensors, a tied head left out.

    `dtype` is that of most of the bytes: a few tensors may differ (routers and norms in float32).
    """

    facts: ConfigFacts
    dtype: str
    layers: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]
    tied: bool


def take_inventory(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Inventory:
    """Sorts a source's tensors.

    Raises:
        ModelError: as `read_facts` and `find_layout`; code "unsupported_dtype", where the weights are no floats that
            can be computed with.
    """
    facts = read_facts(config)
    layout = find_layout(tensors, facts.n_layers)
    tied = facts.tied if facts.tied is not None else not any(map(is_head, layout.shared))
    shared = tuple(name for name in layout.shared if not (tied and is_head(name)))
    kept = [name for layer in layout.layers for name in layer] + list(shared)
    return Inventory(facts, _stored_dtype(tensors[name] for name in kept), layout.layers, shared, tied)


def weights_of(specs: Iterable[TensorSpec]) -> tuple[Weights, ...]:
    """What a file with these tensors holds by dtype, and how much of it a worker may quantise."""
    sizes: Counter[str] = Counter()
    matrices: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.nbytes
        # Convolutions and experts that a family stores as one transposed tensor have three dimensions, and stay floats.
        is_matrix = len(spec.shape) == 2 and not is_router(spec.name)
        matrices[spec.dtype] += spec.nbytes if is_matrix else 0
    return tuple(Weights(dtype, sizes[dtype], matrices[dtype]) for dtype in sorted(sizes))


def outline(model_id: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Manifest:
    """A manifest of files that nobody has made: right in all sizes, for planning only; its digests name nothing.

    Raises:
        ModelError: as `take_inventory`; code "unpublishable", where no manifest can describe the model.
    """
    try:
        return _outline(model_id, take_inventory(config, tensors), tensors)
    except ModelError as error:
        if error.code != "bad_manifest":
            raise
        problem = error.message.removeprefix("bad manifest: ")
        remedy = "Choose another repository or conversion of the model."
        raise ModelError(
            f"{model_id[:200]} cannot be published: {problem}", code="unpublishable", remedy=remedy
        ) from error


def _outline(model_id: str, inventory: Inventory, tensors: Mapping[str, TensorSpec]) -> Manifest:
    facts = inventory.facts

    def file(names: Iterable[str]) -> Blob:
        weights = weights_of(tensors[name] for name in names)
        size = sum(part.nbytes for part in weights)
        return Blob(_NOTHING, size, _NOTHING if size > PIECE_BYTES else "", weights)

    return Manifest(
        model_id=model_id,
        revision="none",
        origin="",
        architecture=facts.architecture,
        dtype=inventory.dtype,
        n_layers=facts.n_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        config=Blob(_NOTHING, 0),
        tokenizer={},
        layers=tuple(map(file, inventory.layers)),
        caches=facts.caches,
        shared={name: file((name,)) for name in inventory.shared},
        sources={},
        tied=inventory.tied,
        workspace=facts.workspace,
    )


def _stored_dtype(specs: Iterable[TensorSpec]) -> str:
    sizes: Counter[str] = Counter()
    for spec in specs:
        if spec.dtype in _FLOATS:
            sizes[spec.dtype] += spec.nbytes
    most = sizes.most_common(1)[0][0] if sizes else "none"
    if most not in _DTYPES:
        remedy = f"Publish a repository whose weights are {', '.join(DTYPE_BYTES)}."
        raise ModelError(f"the model's weights are {most}", code="unsupported_dtype", remedy=remedy)
    return _DTYPES[most]
