"""What every import yields, whether it came from a hub, a directory or a GGUF file: a source that `publish` can cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azu.errors import InputError, ModelError
from azu.models.safetensors_file import TensorSpec

__all__ = ["ModelSource", "hash_file", "load_json", "revision_of"]

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json in use are about 35 MB


@dataclass(frozen=True, slots=True)
class ModelSource:
    """An opened model.

    Args:
        model_id: the name that it would have unless the publisher gives another.
        revision: the hub's commit, or `revision_of(sources)`.
        config: the bytes of an HF config.json.
        files: tokenizer and generation files by name.
        sources: the SHA-256 of every file that went in, by name.
        tensors: all tensors by their HF name.
        origin: the hub's id of the repository, "" where it comes from elsewhere.
        read: returns the raw little-endian bytes of a tensor, by name; the view lives until the next call.
    """

    model_id: str
    revision: str
    config: bytes
    files: Mapping[str, bytes]
    sources: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    read: Callable[[str], bytes | memoryview]
    origin: str = ""


def revision_of(sources: Mapping[str, str]) -> str:
    """Returns a revision for sources without a commit: 40 hex digits of a hash over their names and digests."""
    return hashlib.sha256(json.dumps(dict(sources), sort_keys=True).encode()).hexdigest()[:40]


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hex digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", code="unreadable_source") from error


def load_json(raw: bytes, name: str) -> dict[str, Any]:
    """Parses a JSON object out of a model's file.

    Raises:
        ModelError: code "bad_json".
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not JSON", code="bad_json") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} is not a JSON object", code="bad_json")
    return value
