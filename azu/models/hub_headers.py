"""The headers of a hub repository's safetensors files: all that a planner needs, in kilobytes instead of gigabytes."""

from __future__ import annotations

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported lazily

from azu.errors import ModelError
from azu.models import hub
from azu.models.hub_cache import HubFile, HubRepo
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
    url = hf_hub_url(repo.repo_id, file.name, revision=repo.commit)
    headers = {**build_hf_headers(library_name="azu"), "Accept-Encoding": "identity", "Range": f"bytes=0-{count - 1}"}
    received = bytearray()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_raw(1 << 16):  # decoded, a few bytes could become gigabytes
            received += chunk
            if len(received) >= count:
                return bytes(received[:count])
    raise httpx2.RemoteProtocolError(f"{file.name} broke off")
