"""`azu-node plan`: what of a model would fit into how much memory, from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from azu.errors import InputError
from azu.models.inventory import outline
from azu.models.judged import check_architecture
from azu.models.manifest import Manifest, is_digest
from azu.models.memory import kv_room, layer_bytes, max_layers, stage_memory, weights_bytes
from azu.models.publish import means_path, open_path
from azu.models.safetensors_file import TensorSpec
from azu.models.source import load_json
from azu.sizes import format_size
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE, WEIGHT_FORMATS, WeightFormat
from node.settings import PlanSettings

__all__ = ["Fit", "Plan", "Sizes", "describe", "make_plan", "plan", "show"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model's parts take in one format, in bytes. `activations` and `overhead` are those of its last stage."""

    smallest_layer: int
    largest_layer: int
    embeddings: int
    head: int
    whole: int
    kv_per_token: int
    state_per_job: int
    activations: int
    kernels: int
    overhead: int


@dataclass(frozen=True, slots=True)
class Fit:
    """How many layers fit as the first, a middle or the last stage (0: none), and what else that means.

    `workers` of this memory make the whole model, 0 if no number does. `kv_tokens` are the positions of KV cache in the
    fullest of their stages, `least` the bytes of the smallest stage there is.
    """

    dtype: WeightFormat
    first: int
    middle: int
    last: int
    workers: int
    kv_tokens: int
    least: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole answer; memory in bytes, the chosen format's fit first."""

    model_id: str
    architecture: str
    n_layers: int
    context_length: int
    stored: str
    memory: int
    wanted_kv_tokens: int
    dtype: WeightFormat
    sizes: Sizes
    fits: tuple[Fit, ...]


def plan(settings: PlanSettings) -> None:
    """Print the plan that the settings ask for.

    Raises:
        InputError: there is no such model. ModelError: it cannot be served. NetworkError: the hub is out of reach.
    """
    manifest = describe(settings.model, settings.data_dir)
    memory, dtype = settings.vram, "float32" if settings.dtype == "auto" else settings.dtype
    if memory is None or settings.dtype == "auto":
        from node.engine.hardware import find_device  # torch: only where the device is asked for

        device = find_device(settings.device, settings.vram, 1)
        memory = device.vram
        dtype = device.native_dtype if settings.dtype == "auto" else settings.dtype
    result = make_plan(manifest, memory, settings.kv_tokens, dtype)
    print(json.dumps(asdict(result), indent=2) if settings.as_json else show(result))  # noqa: T201 - the output


def describe(model: str, data_dir: Path) -> Manifest:
    """A model's manifest, or an outline of one: from a published model, a folder, a .gguf file or the hub.

    Raises:
        AzuError: as the sources' readers.
    """
    path = Path(model).expanduser()
    if not path.exists():
        published = _published(model, data_dir)
        if published is not None:
            return published
        if is_digest(model):
            remedy = "Name the data folder of a node or coordinator that has it: --data-dir FOLDER"
            raise InputError(f"{data_dir} does not hold manifest {model}", code="unknown_model", remedy=remedy)
    if not (path.exists() or means_path(model)):
        from azu.models.hub_headers import read_hub  # huggingface_hub and its HTTP client: only where needed

        return _outline(*read_hub(model))
    with open_path(path, unhashed=True) as source:
        return _outline(source.model_id, source.config, source.tensors)


def _outline(model_id: str, config_json: bytes, tensors: Mapping[str, TensorSpec]) -> Manifest:
    config = load_json(config_json, "config.json")
    drawn = outline(model_id, config, tensors)
    check_architecture(config)
    return drawn


def _published(model: str, data_dir: Path) -> Manifest | None:
    if not (data_dir / "manifests").is_dir():  # a look must not make a data folder
        return None
    from azu.distribution import Library

    found = [manifest for digest, manifest in Library(data_dir).manifests() if model in (digest, manifest.model_id)]
    return found[0] if found else None


def make_plan(manifest: Manifest, memory: int, kv_tokens: int, dtype: WeightFormat) -> Plan:
    """What fits into `memory` bytes with `kv_tokens` positions of KV cache. Pure."""
    formats = [dtype, *(other for other in WEIGHT_FORMATS if other != dtype)]
    return Plan(
        model_id=manifest.model_id,
        architecture=manifest.architecture,
        n_layers=manifest.n_layers,
        context_length=manifest.context_length,
        stored=manifest.dtype,
        memory=memory,
        wanted_kv_tokens=kv_tokens,
        dtype=dtype,
        sizes=_sizes(manifest, dtype, kv_tokens),
        fits=tuple(_fit(manifest, memory, kv_tokens, other) for other in formats),
    )


def _sizes(manifest: Manifest, dtype: WeightFormat, kv_tokens: int) -> Sizes:
    n = manifest.n_layers
    layers = [layer_bytes(manifest, index, dtype) for index in range(n)]
    last = stage_memory(manifest, n - 1, n, dtype, kv_tokens)
    whole = weights_bytes(manifest, 0, n, dtype)
    return Sizes(
        smallest_layer=min(layers),
        largest_layer=max(layers),
        embeddings=weights_bytes(manifest, 0, n - 1, dtype) - sum(layers[:-1]) if n > 1 else whole - sum(layers),
        head=last.weights - layers[-1] if n > 1 else 0,
        whole=whole,
        kv_per_token=sum(cache.per_token for cache in manifest.caches) * ITEMSIZE[ACTIVATIONS[dtype]],
        state_per_job=sum(cache.state_bytes for cache in manifest.caches),
        activations=last.activations,
        kernels=last.kernels,
        overhead=last.overhead,
    )


def _fit(manifest: Manifest, memory: int, kv_tokens: int, dtype: WeightFormat) -> Fit:
    n = manifest.n_layers

    def largest(start: int, limit: int) -> int:
        return max_layers(manifest, start, memory, kv_tokens, dtype, limit)

    def total(start: int, end: int) -> int:
        return stage_memory(manifest, start, end, dtype, kv_tokens).total

    stages = _chain(n, largest)
    last = next((n - start for start in range(n) if total(start, n) <= memory), 0)
    return Fit(
        dtype=dtype,
        first=largest(0, n),
        middle=max((largest(start, n - 1) for start in range(1, n - 1)), default=0),
        last=last,
        workers=len(stages),
        kv_tokens=min((kv_room(manifest, start, end, dtype, memory, kv_tokens) for start, end in stages), default=0),
        least=min(total(index, index + 1) for index in range(n)),
    )


def _chain(n_layers: int, largest: Any) -> list[tuple[int, int]]:
    """Stages that each take as many layers as they can, the whole model; empty where one cannot take any."""
    stages: list[tuple[int, int]] = []
    position = 0
    while position < n_layers:
        count = largest(position, n_layers)
        if not count:
            return []
        stages.append((position, position + count))
        position += count
    return stages


def show(result: Plan) -> str:
    """The plan as text for a terminal."""
    sizes, fit = result.sizes, result.fits[0]
    per_layer = format_size(sizes.largest_layer)
    if sizes.smallest_layer != sizes.largest_layer:
        per_layer = f"{format_size(sizes.smallest_layer)} to {per_layer}"
    stored = f"published in {result.stored}, context of {result.context_length} tokens"
    lines = [
        f"{result.model_id}  {result.architecture}, {result.n_layers} layers, {stored}",
        "",
        f"In {result.dtype}",
        *_rows(
            [
                ("weights, each layer", per_layer),
                ("weights, embeddings", format_size(sizes.embeddings)),
                ("weights, norm and head", format_size(sizes.head)),
                ("weights, whole model", format_size(sizes.whole)),
                ("KV cache, each token", f"{format_size(sizes.kv_per_token)} in all layers"),
                ("state, each job", f"{format_size(sizes.state_per_job)} in all layers"),
                ("activations", f"up to {format_size(sizes.activations)}"),
                ("kernels, on a CPU", f"up to {format_size(sizes.kernels)}"),
                ("overhead", f"from {format_size(sizes.overhead)}"),
            ]
        ),
        "",
        f"In {format_size(result.memory)}, with a KV cache of {result.wanted_kv_tokens} tokens",
        *_rows(
            [
                ("format", "first stage", "middle", "last", "workers for all", "KV tokens"),
                *[_fit_row(other) for other in result.fits],
            ]
        ),
    ]
    return "\n".join([*lines, *_advice(result, fit)])


def _fit_row(fit: Fit) -> tuple[str, ...]:
    counts = (str(count) if count else "-" for count in (fit.first, fit.middle, fit.last, fit.workers, fit.kv_tokens))
    return (fit.dtype, *counts)


def _advice(result: Plan, fit: Fit) -> list[str]:
    if fit.workers:
        return []
    if fit.first or fit.middle or fit.last:
        problem = f"Workers of {format_size(result.memory)} alone cannot hold the model in {fit.dtype}: one of its ends"
        problem += " takes more."
    else:
        problem = f"Not a single layer fits in {fit.dtype}: the smallest stage takes {format_size(fit.least)}."
    smaller = [other.dtype for other in result.fits[1:] if other.workers]
    ways = [f"--dtype {smaller[0]}" if smaller else "", "more memory (--vram)", "a smaller KV cache (--kv-tokens)"]
    return ["", problem, f"What would help: {', '.join(way for way in ways if way)}."]


def _rows(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they need to be, the first to the left."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows)
    return [f"  {'  '.join(cells)}" for cells in lines]
