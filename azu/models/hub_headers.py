"""The headers of a hub repository's safetensors files: all that a planner needs, in kilobytes instead of gigabytes."""

from __future__ import annotations

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import hf_raise_for_status

from azu.errors import ModelError
from azu.models import hub
from azu.models.hub_cache import HubFile, HubRepo
from azu.models.hub_http import request_file
from azu.models.safetensors_file import MAX_HEADER_BYTES, TensorSpec, parse_header

__all__ = ["read_hub"]

_FIRST_BYTES = 1 << 18  # most headers fit: one request a file


def read_hub(source: str) -> tuple[str, bytes, dict[str, TensorSpec]]:
    """Returns a hub model's id, its config.json, and its tensors by name. No weights are downloaded.

    Raises:
        AzuError: as `azu.models.hub.find_repo` and `plan`; ModelError, code "bad_safetensors", for a malformed header.
    """
    plan = hub.plan(hub.find_repo(source))
    tensors: dict[str, TensorSpec] = {}
    with hub.hub_errors(plan.repo.repo_id, plan.repo.commit):
        for file in plan.weights:
            header = parse_header(_header(plan.repo, file), file.size)
            tensors |= {name: TensorSpec(name, info.dtype, info.shape) for name, info in header.items()}
    config = plan.cache.snapshot(plan.repo.commit) / "config.json"
    return plan.repo.repo_id, config.read_bytes(), tensors


def _header(repo: HubRepo, file: HubFile) -> bytes:
    start = _beginning(repo, file, min(_FIRST_BYTES, file.size))
    needed = 8 + int.from_bytes(start[:8], "little")
    if needed > min(8 + MAX_HEADER_BYTES, file.size):  # before it is fetched
        raise ModelError(f"{file.name} of {repo.repo_id} has no safetensors header", code="bad_safetensors")
    return start if needed <= len(start) else _beginning(repo, file, needed)


def _beginning(repo: HubRepo, file: HubFile, count: int) -> bytes:
    """A file's first bytes; what a server sends beyond them, if it knows no ranges, is not read."""
    received = bytearray()
    with request_file(repo.repo_id, file.name, repo.commit, f"0-{count - 1}") as response:
        hf_raise_for_status(response)
        for chunk in response.iter_raw(1 << 16):
            received += chunk
            if len(received) >= count:
                return bytes(received[:count])
    raise httpx2.RemoteProtocolError(f"{file.name} broke off")
