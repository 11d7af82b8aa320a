"""Imports a directory as the HF hub lays it out: config.json, safetensors in one file or in shards, tokenizer files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from azu.errors import InputError, ModelError
from azu.models.safetensors_file import TensorFile, TensorSpec, open_tensors
from azu.models.source import MAX_JSON_BYTES, ModelSource, hash_file, load_json, revision_of

__all__ = ["TOKENIZER_FILES", "UNSAFE_SUFFIXES", "open_directory"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})  # pickles: loading one runs its code

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


@contextmanager
def open_directory(root: Path, *, model_id: str | None = None, revision: str | None = None) -> Iterator[ModelSource]:
    """Opens a local model directory or hub snapshot; its weights stay memory-mapped while the source is open.

    Args:
        model_id: the name to give it; the directory's own where omitted.
        revision: the hub's commit; a hash of the files where omitted.

    Raises:
        ModelError: code "no_config", "unsafe_weights" (only pickles there), "no_weights", "bad_index" or
            "bad_safetensors".
    """
    config = _read(root / "config.json", "no_config", "A model needs its config.json.")
    shards = _find_shards(root)
    files = {name: _read(root / name) for name in TOKENIZER_FILES if (root / name).is_file()}
    inputs = ["config.json", *files, *shards, *([_INDEX] if (root / _INDEX).is_file() else [])]
    sources = {name: hash_file(root / name) for name in sorted(set(inputs))}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(open_tensors(root / name)) for name in shards}
        where = _locate(opened, shards)
        yield ModelSource(
            model_id=model_id or root.resolve().name,
            revision=revision or revision_of(sources),
            config=config,
            files=files,
            sources=sources,
            tensors={name: TensorSpec(name, file[name].dtype, file[name].shape) for name, file in where.items()},
            read=lambda name: where[name].raw(name),
        )


def _find_shards(root: Path) -> Mapping[str, frozenset[str] | None]:
    """Returns file name to the tensors that the index places there; None for a single file, which has them all."""
    if (root / _INDEX).is_file():
        return _read_index(_read(root / _INDEX))
    if (root / _SINGLE).is_file():
        return {_SINGLE: None}
    others = sorted(path.name for path in root.glob("*.safetensors") if _SHARD.fullmatch(path.name))
    if len(others) == 1:
        return {others[0]: None}
    if any(path.suffix in UNSAFE_SUFFIXES for path in root.iterdir()):
        remedy = "Convert it to safetensors, or publish a repository that has them."
        raise ModelError(f"{root.name} has only pickled weights", code="unsafe_weights", remedy=remedy)
    remedy = f"It needs {_SINGLE} or {_INDEX} with its shards."
    raise ModelError(f"{root.name} has no safetensors weights", code="no_weights", remedy=remedy)


def _read_index(raw: bytes) -> dict[str, frozenset[str]]:
    weight_map = load_json(raw, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{_INDEX} has no weight_map", code="bad_index")
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file) or ".." in file:  # it becomes a path
            raise ModelError(f"{_INDEX} names the shard {json.dumps(file)[:100]}", code="bad_index")
        shards.setdefault(file, set()).add(tensor)
    return {file: frozenset(tensors) for file, tensors in sorted(shards.items())}


def _locate(opened: Mapping[str, TensorFile], shards: Mapping[str, frozenset[str] | None]) -> dict[str, TensorFile]:
    where: dict[str, TensorFile] = {}
    for name, file in opened.items():
        for tensor in shards[name] or file:
            if tensor not in file:
                raise ModelError(f"{_INDEX} places {tensor} in {name}, which lacks it", code="bad_index")
            where[tensor] = file
    return where


def _read(path: Path, code: str = "unreadable_source", remedy: str = "") -> bytes:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes", code="bad_json")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent.name} has no {path.name}", code=code, remedy=remedy) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", code="unreadable_source") from error
