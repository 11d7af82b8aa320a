"""A job's KV cache in memory that is taken once: transformers' own grows by copying all of it at every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedConfig

from azu.models.slots import POSITIONS, Slot

__all__ = ["GROWTH", "ReservedLayer", "new_cache", "place_of"]

GROWTH = 256  # tokens by which a layer grows that was told too few


def new_cache(config: PreTrainedConfig, tokens: int, slot: Slot | None = None) -> DynamicCache:
    """Returns an empty cache for the layers of `config`, whatever kinds they are.

    Args:
        tokens: how many the layers that keep all of them have room for; they grow where more come. Sliding windows and
            the states of linear attention are as large as they are.
        slot: where those layers lie while they fit in it.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        ReservedLayer(tokens, slot, index) if type(layer) is DynamicLayer else layer
        for index, layer in enumerate(cache.layers)
    ]
    return cache


def place_of(cache: Cache) -> int:
    """The number of a cache's slot; 0 where it has none."""
    slots = (layer.slot for layer in cache.layers if isinstance(layer, ReservedLayer))
    return next((slot.number for slot in slots if slot is not None), 0)


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # no annotations upstream
    """Keys and values are the filled front, [1, heads, tokens, width], of buffers that are longer.

    Attributes:
        slot: where the buffers lie; None where they are the layer's own. length: how many tokens it holds.
    """

    def __init__(self, tokens: int, slot: Slot | None = None, index: int = 0) -> None:
        self.is_initialized = False  # instead of upstream's __init__, which sets keys and values
        self.slot = slot if tokens <= POSITIONS else None
        self.length = 0
        self._index = index
        self._room = tokens
        self._buffers: tuple[torch.Tensor, ...] = ()

    # Upstream they are attributes: as such they would be made anew for every token, whether somebody reads them or not.
    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """[1, heads, tokens, width]; None where nothing was run."""
        return self._buffers[0][..., : self.length, :] if self._buffers else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """As `keys`."""
        return self._buffers[1][..., : self.length, :] if self._buffers else None

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        buffers = (self.keys, self.values) if self.slot is not None else self._buffers
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def get_seq_length(self) -> int:
        """See `length`."""
        return self.length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Append these; returns all keys and values then."""
        states = key_states, value_states
        start, end = self.length, self.length + key_states.shape[-2]
        if not self._buffers or end > self._room:
            self._buffers = (not self._buffers and self._in_slot(states)) or self._grown(states, end)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        for buffer, new in zip(self._buffers, states, strict=True):
            buffer[..., start:end, :] = new
        self.length = end
        return self.keys, self.values

    def _in_slot(self, states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Buffers in the slot for such keys and values; none where they cannot lie there."""
        if self.slot is None or any(each.ndim != 4 or each.shape[2] > POSITIONS for each in states):
            return ()
        try:
            buffers = tuple(self.slot.rows(self._index, kind, each) for kind, each in enumerate(states))
        except OSError:  # the system gives no more addresses; memory it may have
            return ()
        self._room = POSITIONS
        return buffers

    def _grown(self, states: Sequence[torch.Tensor], tokens: int) -> tuple[torch.Tensor, ...]:
        """Buffers of its own for so many tokens, in which lies what it holds."""
        self._room = self._room if tokens <= self._room else -(-tokens // GROWTH) * GROWTH
        buffers = tuple(each.new_empty((*each.shape[:-2], self._room, each.shape[-1])) for each in states)
        if self._buffers:
            for buffer, held in zip(buffers, self._buffers, strict=True):
                buffer[..., : self.length, :] = held[..., : self.length, :]
        self.slot = None  # not before: what lies in it goes with it
        return buffers
