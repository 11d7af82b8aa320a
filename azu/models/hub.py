"""Fetches a model from the Hugging Face hub: safetensors and text files only, at one resolved commit.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work by huggingface_hub's own rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from azu.errors import AzuError, InputError, InternalError, ModelError, NetworkError, TrustError
from azu.models.directory_source import open_directory
from azu.models.manifest import is_digest
from azu.models.source import ModelSource

__all__ = ["HUB_ID", "open_hub"]

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?)(@(?P<revision>[\w./-]{1,200}))?")

# Whatever is not named here never reaches the disk; pickles above all.
_ALLOWED = ["config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template*"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_IGNORED = ["*/*", "consolidated*"]  # subfolders and Mistral's second copy of the same weights


@contextmanager
def open_hub(source: str) -> Iterator[ModelSource]:
    """Downloads "owner/name" or "owner/name@revision" (or finds it in the hub's cache) and opens it.

    Raises:
        InputError: code "bad_source", "gated_model", "unknown_model" or "unknown_revision".
        NetworkError: code "hub_unreachable".
        ModelError: as `open_directory`; a repository with only pickles downloads nothing but its text files.
        TrustError: code "digest_mismatch", where a file is not what the hub says it is.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(
            f"{source!r} is no hub id", code="bad_source", remedy="Write owner/name or owner/name@revision."
        )
    snapshot = _download(match["repo"], match["revision"])
    with open_directory(snapshot, model_id=match["repo"], revision=snapshot.name) as opened:
        _verify(snapshot, opened)
        yield opened


def _download(repo: str, revision: str | None) -> Path:
    try:
        path = snapshot_download(repo, revision=revision, allow_patterns=_ALLOWED + _WEIGHTS, ignore_patterns=_IGNORED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        raise _mapped(error, repo, revision) from error
    return Path(path)


def _mapped(error: Exception, repo: str, revision: str | None) -> AzuError:
    if isinstance(error, GatedRepoError):
        remedy = f"Accept its licence at https://huggingface.co/{repo} and set HF_TOKEN."
        return InputError(f"{repo} is gated", code="gated_model", remedy=remedy)
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{repo} has no revision {revision}", code="unknown_revision")
    if isinstance(error, RepositoryNotFoundError):
        remedy = "Check the id; a private one needs HF_TOKEN."
        return InputError(f"{repo} is not on the hub", code="unknown_model", remedy=remedy)
    if isinstance(error, HFValidationError):
        return InputError(f"{repo!r} is no hub id", code="bad_source")
    if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | httpx2.HTTPError | ConnectionError):
        remedy = "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or publish a local directory."
        return NetworkError(f"{repo} cannot be fetched from the hub", code="hub_unreachable", remedy=remedy)
    return InternalError(f"{repo} cannot be stored ({error})", code="storage", remedy="Check HF_HOME and its disk.")


def _verify(snapshot: Path, opened: ModelSource) -> None:
    """Large files lie in the hub's cache under the SHA-256 that the hub announced; ours must be the same."""
    for name, digest in opened.sources.items():
        announced = (snapshot / name).resolve().name
        if is_digest(announced) and announced != digest:
            remedy = "Delete it from the hub cache and fetch it again."
            raise TrustError(f"{name} does not have the hub's SHA-256", code="digest_mismatch", remedy=remedy)
    if not opened.tensors:
        raise ModelError("the repository has no tensors", code="no_weights")
