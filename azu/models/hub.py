"""Imports a model from the Hugging Face hub: safetensors and text files only, at one commit, each file checked.

In three steps, so that whatever can be refused is refused before its bytes are fetched:

    find_repo   one request: the commit, and the files with the digests that the hub publishes
    plan        fetches config.json and the index of the shards, and judges both
    open_plan   fetches and verifies the rest, and opens it as a source

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE work by huggingface_hub's own rules.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from azu.errors import AzuError, InputError, InternalError, ModelError, NetworkError
from azu.logs import log
from azu.models.directory_source import (
    INDEX,
    TOKENIZER_FILES,
    UNSAFE_SUFFIXES,
    bad_index,
    choose_weights,
    is_weights,
    open_directory,
    read_index,
)
from azu.models.facts import read_facts
from azu.models.hub_cache import DIGEST, HubFile, HubRepo, RepoCache
from azu.models.progress import Progress, Report, silent
from azu.models.source import HUB_ID, MAX_JSON_BYTES, ModelSource, load_json

__all__ = ["Plan", "find_repo", "hub_errors", "open_plan", "plan"]

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a repository a model is made of; `weights` are those of `files` that hold tensors."""

    repo: HubRepo
    cache: RepoCache
    config: dict[str, Any]
    files: tuple[HubFile, ...]
    weights: tuple[HubFile, ...]

    @property
    def missing_bytes(self) -> int:
        """How much has yet to be fetched."""
        return sum(map(self.cache.missing_bytes, self.files))

    @property
    def weight_bytes(self) -> int:
        """The size of the weights."""
        return sum(file.size for file in self.weights)


def find_repo(source: str) -> HubRepo:
    """Asks the hub what "owner/name" or "owner/name@revision" is now.

    Where the hub is out of reach, or HF_HUB_OFFLINE is set, its last answer counts if there was one.

    Raises:
        InputError: code "bad_source", "unknown_model", "unknown_revision", "gated_model" or "hub_refused".
        ModelError: code "bad_json", where a text file is too large to be one.
        NetworkError: code "hub_unreachable".
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(
            f"{source[:200]!r} is no hub id", code="bad_source", remedy="Write owner/name or owner/name@revision."
        )
    repo_id, revision = match["repo"], match["revision"] or constants.DEFAULT_REVISION
    cache = RepoCache(repo_id)
    with hub_errors(repo_id, revision):
        try:
            repo = _ask(repo_id, revision)
        except (httpx2.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            is_refusal = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            known = None if is_refusal else cache.recall(revision)
            if known is None:
                raise
            if not isinstance(error, OfflineModeIsEnabled):
                log(logger, logging.WARNING, "hub out of reach, its cache is used", model=repo_id, reason=str(error))
            return known
        cache.remember(revision, repo)
        return repo


def _ask(repo_id: str, revision: str) -> HubRepo:
    try:
        info = HfApi(library_name="azu").model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):  # it becomes a path
            raise ValueError("it names no commit")
        files = {file.name: file for file in map(_listed, info.siblings or ()) if file is not None}
    except HFValidationError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        remedy = "Check HF_ENDPOINT, or try again."
        raise NetworkError(
            f"what answers for the hub is none ({error})", code="hub_unreachable", remedy=remedy
        ) from error
    pickles = [one.rfilename for one in info.siblings or () if Path(one.rfilename).suffix in UNSAFE_SUFFIXES]
    return HubRepo(repo_id, commit, files, tuple(pickles))


def _listed(sibling: RepoSibling) -> HubFile | None:
    """A file that a model may be made of; None for all others, which thus never reach the disk."""
    name = sibling.rfilename
    if not (name in (_CONFIG, INDEX, *TOKENIZER_FILES) or is_weights(name)):
        return None
    size = sibling.lfs.size if sibling.lfs else sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not isinstance(size, int) or size < 0 or not DIGEST.fullmatch(str(digest)):
        raise ValueError(f"it lists no size or digest of {name}")
    if not is_weights(name) and size > MAX_JSON_BYTES:
        raise ModelError(f"{name} is larger than {MAX_JSON_BYTES} bytes", code="bad_json")
    return HubFile(name, size, str(digest))


def plan(repo: HubRepo) -> Plan:
    """Fetches and judges what says which files are needed.

    Raises:
        ModelError: code "no_config", "no_weights", "unsafe_weights" (only pickles there), "bad_index" or "bad_json",
            and those of `read_facts`: no byte of the weights was fetched then.
        TrustError, NetworkError, InternalError: as `open_plan`.
    """
    if _CONFIG not in repo.files:
        problem = f"{repo.repo_id} has no {_CONFIG}"
        raise ModelError(problem, code="no_config", remedy="A model needs one; adapters and GGUF repositories do not.")
    names = list(repo.files)
    is_sharded = choose_weights(repo.repo_id, [*names, *repo.pickles]) == INDEX
    cache = RepoCache(repo.repo_id)
    judged = [repo.files[name] for name in (_CONFIG, INDEX) if name == _CONFIG or is_sharded]
    _bring(repo, cache, judged, silent)
    snapshot = cache.snapshot(repo.commit)
    config = load_json((snapshot / _CONFIG).read_bytes(), _CONFIG)
    read_facts(config)
    shards = [*read_index((snapshot / INDEX).read_bytes())] if is_sharded else [choose_weights(repo.repo_id, names)]
    for name in shards:
        if name not in repo.files:
            raise bad_index(f"names {name}, which {repo.repo_id} does not have")
    weights = tuple(repo.files[name] for name in shards)
    texts = tuple(repo.files[name] for name in TOKENIZER_FILES if name in repo.files)
    return Plan(repo, cache, config, (*judged, *texts, *weights), weights)


@contextmanager
def open_plan(plan: Plan, report: Report) -> Iterator[ModelSource]:
    """Fetches what is missing, verifies all of it, and opens it; may be interrupted anywhere and done again.

    Raises:
        InputError: code "gated_model" or "hub_refused".
        ModelError: as `open_directory`.
        NetworkError: code "hub_unreachable", where the hub breaks off again and again; what came stays.
        TrustError: code "digest_mismatch" or "size_mismatch", where a file is not what the hub publishes; it is
            deleted.
        InternalError: code "storage", where the disk is full.
    """
    repo = plan.repo
    sources = _bring(repo, plan.cache, plan.files, report)
    snapshot = plan.cache.snapshot(repo.commit)
    with open_directory(snapshot, model_id=repo.repo_id, revision=repo.commit, sources=sources) as opened:
        yield replace(opened, origin=repo.repo_id)


class _Counter:
    """Bytes over several files."""

    def __init__(self, stage: Literal["downloading", "verifying"], total: int, report: Report, done: int = 0) -> None:
        self._stage = stage
        self._total = total
        self._report = report
        self._done = done

    def of(self, file: HubFile) -> Callable[[int], None]:
        def advance(nbytes: int) -> None:
            self._done += nbytes
            self._report(Progress(self._stage, file.name, self._done, self._total))

        return advance


def _bring(repo: HubRepo, cache: RepoCache, files: Sequence[HubFile], report: Report) -> dict[str, str]:
    """Fetch and verify files; their SHA-256 by name."""
    total = sum(file.size for file in files)
    with hub_errors(repo.repo_id, repo.commit):
        here = {file.name: file.size - cache.missing_bytes(file) for file in files}  # from the start: no rate counts it
        counter = _Counter("downloading", total, report, sum(here.values()))
        for file in files:
            cache.fetch(repo, file, counter.of(file), here[file.name])
        counter = _Counter("verifying", total, report)
        return {file.name: cache.verify(repo, file, counter.of(file)) for file in files}


@contextmanager
def hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """Maps what huggingface_hub and its HTTP client raise about a repository."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise _mapped(error, repo_id, revision) from error


def _mapped(error: Exception, repo_id: str, revision: str) -> AzuError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        remedy = f"Accept its licence at https://huggingface.co/{repo_id}, and set HF_TOKEN to a token of that account."
        return InputError(f"{repo_id} is gated", code="gated_model", remedy=remedy)
    if isinstance(error, RevisionNotFoundError):
        remedy = "Check the branch, tag or commit after the @."
        return InputError(f"{repo_id} has no revision {revision}", code="unknown_revision", remedy=remedy)
    if isinstance(error, RepositoryNotFoundError):
        remedy = "Check the id; a private one needs HF_TOKEN."
        return InputError(f"{repo_id} is not on the hub", code="unknown_model", remedy=remedy)
    if isinstance(error, HFValidationError):
        return InputError(f"{repo_id!r} is no hub id", code="bad_source", remedy="Write owner/name.")
    if status in (401, 403):
        remedy = "Check HF_TOKEN: it may be mistyped or expired, or lack access to this repository."
        return InputError(f"the hub refuses access to {repo_id}", code="hub_refused", remedy=remedy)
    if isinstance(error, OfflineModeIsEnabled):
        remedy = "Unset HF_HUB_OFFLINE, or publish a local directory."
        problem = f"{repo_id} was not fetched here before, and HF_HUB_OFFLINE is set"
        return NetworkError(problem, code="hub_unreachable", remedy=remedy)
    if isinstance(error, HfHubHTTPError | httpx2.HTTPError | httpx2.InvalidURL | ConnectionError):
        remedy = "Check the connection and HF_ENDPOINT and try again: what came is kept. Or publish a local directory."
        reason = f"status {status}" if status else str(error) or type(error).__name__
        return NetworkError(f"{repo_id} cannot be fetched ({reason})", code="hub_unreachable", remedy=remedy)
    return InternalError(
        f"{repo_id} cannot be stored in the hub's cache ({error})",
        code="storage",
        remedy=f"Free some disk space, or set HF_HOME to a folder on another disk than {constants.HF_HOME}.",
    )
