"""A job's KV cache in memory that is taken once: transformers' own grows by copying all of it at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer, PreTrainedConfig

__all__ = ["GROWTH", "ReservedLayer", "new_cache"]

GROWTH = 256  # tokens by which a layer grows that was told too few


def new_cache(config: PreTrainedConfig, tokens: int) -> DynamicCache:
    """Returns an empty cache for the layers of `config`, whatever kinds they are.

    Args:
        tokens: how many the layers that keep all of them have room for; they grow where more come. Sliding windows and
            the states of linear attention are as large as they are.
    """
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # no annotations upstream
    """Keys and values are the filled front, [..., tokens, width], of buffers that are longer."""

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = tokens
        self._buffers: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if end > self._room:
            self._room = -(-end // GROWTH) * GROWTH
            self._buffers = ()
        if not self._buffers:
            self._buffers = self._grown(self.keys, key_states), self._grown(self.values, value_states)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _grown(self, held: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        buffer = like.new_empty((*like.shape[:-2], self._room, like.shape[-1]))
        if held is not None and held.numel():
            buffer[..., : held.shape[-2], :] = held
        return buffer
