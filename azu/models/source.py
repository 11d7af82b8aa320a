"""What every import yields, whether it came from a hub, a directory or a GGUF file: a source that `publish` can cut."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azu.errors import ModelError
from azu.models.safetensors_file import TensorSpec
from azu.models.source_errors import source_changed, unreadable_source

__all__ = ["HUB_ID", "ModelSource", "hash_file", "load_json", "local_id", "revision_of", "watch"]

# "owner/name" or "owner/name@revision". Both parts become paths: neither may begin with a dot or a slash, or hold "..".
HUB_ID = re.compile(
    r"(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?)"
    r"(@(?P<revision>\w[\w.-]{0,99}(/\w[\w.-]{0,99}){0,4}))?",
    re.ASCII,
)
MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json in use are about 35 MB
MAX_INDEX_BYTES = 32 << 20  # an index names each tensor; DeepSeek-V3's has 9 MB
MAX_CONFIG_BYTES = 1 << 20  # some kilobytes in use


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
        confirm: raises InputError, code "source_changed", where a file is not what it was when it was opened.
        read: yields the raw little-endian bytes of a tensor, by name, in pieces.
    """

    model_id: str
    revision: str
    config: bytes
    files: Mapping[str, bytes]
    sources: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    read: Callable[[str], Iterable[bytes | memoryview]]
    confirm: Callable[[], None]
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
        raise unreadable_source(path, error) from error


def local_id(name: str) -> str:
    """Returns a model's id out of a file's or folder's name: what an id may not hold becomes a dash."""
    return re.sub(r"(?:[^A-Za-z0-9._-]|\.{2,})+", "-", name).strip("._-")[:128] or "model"


def watch(paths: Iterable[Path]) -> Callable[[], None]:
    """Returns what raises InputError, code "source_changed", where one of these files was changed since."""
    before = {path: _stamp(path) for path in paths}

    def confirm() -> None:
        for path, stamp in before.items():
            if _stamp(path) != stamp:
                raise source_changed(path)

    return confirm


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def load_json(raw: bytes, name: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Parses a JSON object out of a model's file of up to `limit` bytes; in memory it may take 25 times as many.

    Raises:
        ModelError: code "bad_json".
    """
    if len(raw) > limit:
        raise _bad_json(f"{name} is larger than {limit} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _bad_json(f"{name} is not JSON") from error
    if not isinstance(value, dict):
        raise _bad_json(f"{name} is not a JSON object")
    return value


def _bad_json(problem: str) -> ModelError:
    return ModelError(problem, code="bad_json", remedy="Fetch the file again, or choose another repository.")
