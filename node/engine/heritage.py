"""A job's KV cache as bytes, piece by piece. Runs on the device thread.

Only caches that keep a key and a value of each position and nothing else can be handed over: they grow at their end, so
that what was read once stays right. Windows and states do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from azu.models.cache import ReservedLayer

__all__ = ["Form", "Piece", "form_of", "pieces", "read_piece", "write_piece"]

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Form:
    """What a stage's cache keeps of a position: for each layer (heads, width of a key, width of a value)."""

    layers: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype

    def row_bytes(self, layer: int) -> int:
        """Of one position in one layer."""
        heads, key, value = self.layers[layer]
        return heads * (key + value) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions `position` .. `position + rows - 1` in one layer."""

    layer: int
    position: int
    rows: int


def form_of(cache: Any) -> Form | None:
    """Of a cache that something was run with; None where it cannot be handed over."""
    layers = cache.layers[:-1]  # the last one is nobody's, see `azu.models.splice.Stage.new_cache`
    if not layers or not all(type(layer) is ReservedLayer and layer.is_initialized for layer in layers):
        return None
    shapes = tuple((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers)
    same = {layer.values.shape[1] == layer.keys.shape[1] for layer in layers}
    dtypes = {each.dtype for layer in layers for each in (layer.keys, layer.values)}
    return Form(shapes, dtypes.pop()) if same == {True} and len(dtypes) == 1 else None


def pieces(form: Form, positions: int) -> Iterator[Piece]:
    """All of so many positions, in the order in which they are sent; a few MiB each."""
    for layer in range(len(form.layers)):
        most = max(1, _PIECE_BYTES // form.row_bytes(layer))
        for position in range(0, positions, most):
            yield Piece(layer, position, min(most, positions - position))


def read_piece(cache: Any, piece: Piece) -> memoryview:
    """The keys [heads, rows, width] and then the values."""
    layer, end = cache.layers[piece.layer], piece.position + piece.rows
    parts = [each[0, :, piece.position : end].reshape(-1) for each in (layer.keys, layer.values)]
    flat = torch.cat(parts).to("cpu")
    return memoryview(flat.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs


def write_piece(cache: Any, form: Form, piece: Piece, body: bytearray, device: torch.device) -> None:
    """Append what `read_piece` gave; pieces come in order."""
    heads, key, value = form.layers[piece.layer]
    flat = torch.frombuffer(body, dtype=form.dtype).to(device)
    keys, values = flat[: heads * piece.rows * key], flat[heads * piece.rows * key :]
    cache.layers[piece.layer].update(keys.view(1, heads, piece.rows, key), values.view(1, heads, piece.rows, value))
