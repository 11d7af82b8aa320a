"""Publishing: a model from a GGUF file, a directory or the hub becomes per-layer files in a store, and a manifest.

Every byte is read once, sliced raw out of its mapped file, and lands under its own SHA-256. Publishing is idempotent:
an index in the store remembers which source files gave which manifest, so that a second run only hashes the source.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from azu.errors import InputError, ModelError
from azu.models.directory_source import UNSAFE_SUFFIXES, open_directory
from azu.models.facts import ConfigFacts, read_facts
from azu.models.layout import Layout, find_layout, is_head
from azu.models.manifest import DTYPE_BYTES, Blob, Manifest, Weights
from azu.models.safetensors_file import TensorSpec, serialize
from azu.models.source import ModelSource, load_json
from azu.models.store import LayerStore

__all__ = ["Progress", "publish"]

Progress = Callable[[str, int, int], None]
"""Called with what was just stored, how many files are done, and how many there are."""

_CUT = 2  # raise it when the way a source is cut changes: the index then misses
_INDEX = "published.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


def publish(
    source: str, store: LayerStore, *, model_id: str | None = None, progress: Progress | None = None
) -> Manifest:
    """Imports a model into the store.

    Args:
        source: path of a .gguf file, path of a directory, or hub id as "owner/name" or "owner/name@revision".
        model_id: the name that clients will ask for; the source's own where omitted.

    Raises:
        InputError: where there is no such source, or it is gated.
        ModelError: where the model cannot be published (see the codes of the openers, `read_facts`, `find_layout`).
        NetworkError: where the hub cannot be reached.
        InternalError: code "storage", where the disk is full.
    """
    with _open(source) as opened:
        if model_id is not None:
            opened = replace(opened, model_id=model_id)
        return _known(opened, store) or _cut(opened, store, progress or _silent)


def _open(source: str) -> AbstractContextManager[ModelSource]:
    path = Path(source).expanduser()
    if path.suffix.lower() in UNSAFE_SUFFIXES:
        remedy = "Convert it to safetensors; azu never loads pickles."
        raise ModelError(f"{path.name} is a pickle", code="unsafe_weights", remedy=remedy)
    if path.is_dir():
        return open_directory(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{path.name} is neither a .gguf file nor a directory",
                code="bad_source",
                remedy="Name a .gguf file, the folder that holds config.json and *.safetensors, or a hub id.",
            )
        from azu.models.gguf_source import open_gguf  # numpy, gguf, tokenizers: only where needed

        return open_gguf(path)
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix == ".gguf":
        raise InputError(
            f"{source} does not exist",
            code="bad_source",
            remedy="Check the path, or name a hub id such as Qwen/Qwen3-0.6B.",
        )
    from azu.models.hub import open_hub  # huggingface_hub and its HTTP client: only where needed

    return open_hub(source)


def _silent(_label: str, _done: int, _total: int) -> None:
    pass


def _cut(source: ModelSource, store: LayerStore, progress: Progress) -> Manifest:
    facts = read_facts(load_json(source.config, "config.json"))
    layout = find_layout(source.tensors, facts.n_layers)
    tied = facts.tied if facts.tied is not None else not any(map(is_head, layout.shared))
    shared = [name for name in layout.shared if not (tied and is_head(name))]
    dtype = _stored_dtype(source.tensors[name] for name in _kept(layout, shared))
    total = len(layout.layers) + len(shared)
    layers, blobs = [], {}
    for index, names in enumerate(layout.layers):
        layers.append(_store_tensors(source, store, names))
        progress(f"layer {index}", index + 1, total)
    for done, name in enumerate(shared, len(layers) + 1):
        blobs[name] = _store_tensors(source, store, (name,))
        progress(name, done, total)
    manifest = _manifest(source, store, facts, dtype=dtype, layers=tuple(layers), shared=blobs, tied=tied)
    _remember(source, store, manifest)
    return manifest


def _kept(layout: Layout, shared: Iterable[str]) -> list[str]:
    return [name for layer in layout.layers for name in layer] + list(shared)


def _stored_dtype(specs: Iterable[TensorSpec]) -> str:
    """The dtype of most of the bytes: a few tensors may differ (routers and norms in float32)."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        if spec.dtype in _FLOATS:
            sizes[spec.dtype] += spec.nbytes
    most = sizes.most_common(1)[0][0] if sizes else "none"
    if most not in _DTYPES:
        remedy = f"Publish a repository whose weights are {', '.join(DTYPE_BYTES)}."
        raise ModelError(f"the model's weights are {most}", code="unsupported_dtype", remedy=remedy)
    return _DTYPES[most]


def _store_tensors(source: ModelSource, store: LayerStore, names: Iterable[str]) -> Blob:
    specs = [source.tensors[name] for name in names]
    return replace(store.put_chunks(serialize(specs, source.read)), weights=_weights(specs))


def _weights(specs: Iterable[TensorSpec]) -> tuple[Weights, ...]:
    sizes: Counter[str] = Counter()
    matrices: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += spec.nbytes
        matrices[spec.dtype] += spec.nbytes if len(spec.shape) > 1 else 0
    return tuple(Weights(dtype, sizes[dtype], matrices[dtype]) for dtype in sorted(sizes))


def _manifest(
    source: ModelSource,
    store: LayerStore,
    facts: ConfigFacts,
    *,
    dtype: str,
    layers: tuple[Blob, ...],
    shared: dict[str, Blob],
    tied: bool,
) -> Manifest:
    return Manifest(
        model_id=source.model_id,
        revision=source.revision,
        origin=source.origin,
        architecture=facts.architecture,
        dtype=dtype,
        n_layers=facts.n_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        config=store.put_bytes(source.config),
        tokenizer={name: store.put_bytes(data) for name, data in source.files.items()},
        layers=layers,
        caches=facts.caches,
        shared=shared,
        sources=source.sources,
        tied=tied,
    )


def _key(source: ModelSource) -> str:
    parts = [_CUT, source.model_id, source.revision, dict(source.sources)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _known(source: ModelSource, store: LayerStore) -> Manifest | None:
    """The manifest that this source gave before, provided that all its blobs are still here."""
    digest = _read_index(store).get(_key(source))
    if digest is None or not store.has(digest):
        return None
    manifest = Manifest.from_bytes(store.path(digest).read_bytes())
    lists = (blob.piece_list for blob in manifest.blobs())
    wanted = [*manifest.blobs(), *(blob for blob in lists if blob is not None)]
    return manifest if all(store.has(blob.digest) for blob in wanted) else None


def _remember(source: ModelSource, store: LayerStore, manifest: Manifest) -> None:
    """Adds to the index; of two publishers at once one may lose its entry, which costs the next run a rewrite."""
    index = _read_index(store) | {_key(source): store.put_bytes(manifest.to_bytes()).digest}
    temporary = store.root / f"{_INDEX}.{secrets.token_hex(8)}"
    try:
        temporary.write_text(json.dumps(index, indent=1, sort_keys=True))
        os.replace(temporary, store.root / _INDEX)
    finally:
        temporary.unlink(missing_ok=True)


def _read_index(store: LayerStore) -> dict[str, str]:
    try:
        index = json.loads((store.root / _INDEX).read_bytes())
    except (OSError, ValueError):  # absent, or damaged: then everything is published anew
        return {}
    return index if isinstance(index, dict) else {}
