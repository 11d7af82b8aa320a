"""Imports a directory as the HF hub lays it out: config.json, safetensors in one file or in shards, tokenizer files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath

from azu.errors import ModelError
from azu.models.safetensors_file import ForeignFile, TensorSpec, open_foreign
from azu.models.source import (
    MAX_INDEX_BYTES,
    MAX_JSON_BYTES,
    ModelSource,
    hash_file,
    load_json,
    local_id,
    revision_of,
    watch,
)
from azu.models.source_errors import unreadable_source

__all__ = [
    "INDEX",
    "TOKENIZER_FILES",
    "UNSAFE_SUFFIXES",
    "bad_index",
    "choose_weights",
    "is_weights",
    "open_directory",
    "read_index",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})  # pickles: loading one runs its code

INDEX = "model.safetensors.index.json"  # which shard has which tensor
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


@contextmanager
def open_directory(
    root: Path, *, model_id: str | None = None, revision: str | None = None, sources: Mapping[str, str] | None = None
) -> Iterator[ModelSource]:
    """Opens a local model directory or hub snapshot; its weight files stay open while the source is.

    Args:
        model_id: the name to give it; the directory's own where omitted.
        revision: the hub's commit; a hash of the files where omitted.
        sources: the files' SHA-256 by name, and no other file is read; every file is hashed where omitted.

    Raises:
        ModelError: code "no_config", "unsafe_weights" (only pickles there), "unsafe_link", "no_weights", "bad_index" or
            "bad_safetensors".
    """
    config = _read(root / "config.json", "no_config", "A model needs its config.json.")
    shards = _find_shards(root)
    texts = [name for name in TOKENIZER_FILES if (name in sources if sources is not None else (root / name).is_file())]
    files = {name: _read(root / name) for name in texts}
    inputs = {"config.json", *files, *shards, *([INDEX] if (root / INDEX).is_file() else [])}
    confirm = watch(root / name for name in inputs)
    if sources is None:
        sources = {name: hash_file(root / name) for name in sorted(inputs)}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(open_foreign(root / name)) for name in shards}
        where = _locate(opened, shards)
        yield ModelSource(
            model_id=model_id or local_id(root.resolve().name),
            revision=revision or revision_of(sources),
            config=config,
            files=files,
            sources=sources,
            tensors={name: TensorSpec(name, file[name].dtype, file[name].shape) for name, file in where.items()},
            read=lambda name: where[name].chunks(name),
            confirm=confirm,
        )


def is_weights(name: str) -> bool:
    """Returns whether a file in a model's folder may hold weights that can be loaded safely."""
    return _SHARD.fullmatch(name) is not None and ".." not in name


def choose_weights(folder: str, names: Iterable[str]) -> str:
    """Returns which of a folder's files has the weights: INDEX, which names the shards, or a single file.

    Raises:
        ModelError: code "unsafe_weights" (only pickles there) or "no_weights".
    """
    names = set(names)
    for name in (INDEX, _SINGLE):
        if name in names:
            return name
    others = list(filter(is_weights, names))
    if len(others) == 1:
        return others[0]
    if any(PurePath(name).suffix in UNSAFE_SUFFIXES for name in names):
        remedy = "Convert it to safetensors, or publish a repository that has them."
        raise ModelError(f"{folder} has only pickled weights", code="unsafe_weights", remedy=remedy)
    remedy = f"It needs {_SINGLE} or {INDEX} with its shards."
    raise ModelError(f"{folder} has no safetensors weights", code="no_weights", remedy=remedy)


def _find_shards(root: Path) -> Mapping[str, frozenset[str] | None]:
    """Returns file name to the tensors that the index places there; None for a single file, which has them all."""
    chosen = choose_weights(root.name, (path.name for path in root.iterdir() if path.is_file()))
    return read_index(_read(root / INDEX)) if chosen == INDEX else {chosen: None}


def read_index(raw: bytes) -> dict[str, frozenset[str]]:
    """Returns the shards that an index names, each with the tensors that are in there.

    Raises:
        ModelError: code "bad_index", where it names anything but a safetensors file beside it; or "bad_json".
    """
    weight_map = load_json(raw, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_index("has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_weights(file):  # it becomes a path
            raise bad_index(f"names the shard {json.dumps(file)[:100]}")
        shards.setdefault(file, set()).add(tensor)
    return {file: frozenset(tensors) for file, tensors in sorted(shards.items())}


def bad_index(problem: str) -> ModelError:
    """Returns the error for an index that does not hold."""
    remedy = "Fetch or convert the model again, or choose another repository."
    return ModelError(f"{INDEX} {problem}", code="bad_index", remedy=remedy)


def _locate(opened: Mapping[str, ForeignFile], shards: Mapping[str, frozenset[str] | None]) -> dict[str, ForeignFile]:
    where: dict[str, ForeignFile] = {}
    for name, file in opened.items():
        for tensor in shards[name] or file:
            if tensor not in file:
                raise bad_index(f"places {tensor} in {name}, which lacks it")
            where[tensor] = file
    return where


def _read(path: Path, code: str = "unreadable_source", remedy: str = "") -> bytes:
    try:
        _check_link(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes", code="bad_json")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent.name} has no {path.name}", code=code, remedy=remedy) from error
    except OSError as error:
        raise unreadable_source(path, error) from error


def _check_link(path: Path) -> None:
    """Refuses what a folder from a stranger may link to: a device that never ends, or the operator's own secrets.

    Weights may lie anywhere, since nothing but safetensors passes for them. These files are published as they are.
    """
    place, root = path.resolve(strict=True), path.parent.resolve()
    is_inside = place.is_relative_to(root) or place.parent == root.parent.parent / "blobs"  # as the hub's cache links
    if not (is_inside and place.is_file()):
        remedy = "Put the file itself there, if it belongs to the model."
        raise ModelError(f"{path.name} leads out of its folder, or is no file", code="unsafe_link", remedy=remedy)
