"""How much memory a stage takes: weights and KV cache, from the manifest alone. Pure arithmetic, for planners."""

from __future__ import annotations

from azu.errors import ModelError
from azu.models.layout import is_first_stage_tensor
from azu.models.manifest import DTYPE_BYTES, Manifest

__all__ = ["kv_bytes", "max_layers", "weights_bytes"]


def weights_bytes(manifest: Manifest, start: int, end: int, dtype: str) -> int:
    """Returns the weights of layers start..end (end exclusive) in bytes at `dtype`, with what such a stage shares.

    The first stage holds the embeddings, the last the final norm and the head; where the head is tied, both hold the
    embedding, and a stage that is both holds it once.

    Raises:
        ModelError: code "bad_layer_range" or "unsupported_dtype".
    """
    if not 0 <= start < end <= manifest.n_layers:
        raise ModelError(f"layers {start}..{end} do not lie in a model of {manifest.n_layers}", code="bad_layer_range")
    stored = sum(blob.size for blob in manifest.layers[start:end]) + _shared_bytes(
        manifest, first=start == 0, last=end == manifest.n_layers
    )
    return _scaled(stored, manifest, dtype)


def kv_bytes(manifest: Manifest, start: int, end: int, tokens: int, dtype: str) -> int:
    """Returns the KV cache of `tokens` tokens in layers start..end (end exclusive), in bytes at `dtype`."""
    values = sum(cache.per_token for cache in manifest.caches[start:end]) * tokens
    return _scaled(values * DTYPE_BYTES[manifest.dtype], manifest, dtype)


def max_layers(manifest: Manifest, start: int, free_bytes: int, tokens: int, dtype: str) -> int:
    """Returns how many layers from `start` fit into `free_bytes`, with the KV cache of `tokens` tokens; 0 if none."""
    count = 0
    for end in range(start + 1, manifest.n_layers + 1):
        if weights_bytes(manifest, start, end, dtype) + kv_bytes(manifest, start, end, tokens, dtype) > free_bytes:
            break
        count = end - start
    return count


def _shared_bytes(manifest: Manifest, *, first: bool, last: bool) -> int:
    sizes = {name: blob.size for name, blob in manifest.shared.items()}
    before = {name for name in sizes if is_first_stage_tensor(name)}
    needed = {name for name in sizes if (first if name in before else last)}
    if last and manifest.tied and before:
        needed.add(max(before, key=sizes.__getitem__))  # the token embedding is the largest of them
    return sum(sizes[name] for name in needed)


def _scaled(stored: int, manifest: Manifest, dtype: str) -> int:
    """Rounded up, from the stored dtype to the one that the stage computes in."""
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}", code="unsupported_dtype")
    return -(-stored * DTYPE_BYTES[dtype] // DTYPE_BYTES[manifest.dtype])
