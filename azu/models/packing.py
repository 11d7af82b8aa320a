"""Several jobs in one forward pass: their tokens lie behind one another as one sequence.

Embeddings, norms, linear layers and experts work on the whole pack; only attention looks at jobs one by one. So the
model runs with an attention function of ours (transformers' AttentionInterface) and with a `Pack` as its cache, which
hands each job's share of the keys and values to that job's own cache. Positions are the jobs' own, so that rotary
tables are right. It is what vLLM and transformers' continuous batching do, without a kernel of our own.

A family can be packed if its attention goes through that interface and keeps nothing but keys and values, and if a
token's rotary angle does not depend on the others in the pack.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicLayer, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from azu.errors import InternalError
from azu.models.abreast import Abreast, find_abreast
from azu.models.cache import ReservedLayer

__all__ = ["PACKED", "Pack", "can_pack"]

PACKED = "azu_packed"  # our attention function's name
_DEPENDENT_ROPE = ("dynamic", "longrope")  # one job's length would change the others' angles

# What a job's cache may be made of. Indexed layers and linear attention keep more than keys and values.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, ReservedLayer)

_running = threading.local()  # the pack that this thread computes: one thread computes for one device


class Pack(Cache):
    """What the model takes for its cache in one forward pass over several jobs.

    Args:
        caches: each job's own.
        rows: how many of the pack's tokens are each job's, in the same order.
    """

    def __init__(self, caches: Sequence[Cache], rows: Sequence[int]) -> None:
        self.layers = []  # instead of upstream's __init__, which makes layers of its own
        self._caches = caches
        self._rows = list(rows)
        self._abreast = find_abreast(caches, self._rows)
        self._index = 0  # of the layer that is computed
        self._layers: list[Any] = []  # that one in all caches
        self._together: Abreast | None = None  # the jobs that share a call in it
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keys and values of the others
        self._masks: dict[tuple[int, int, int], torch.Tensor] = {}

    def __enter__(self) -> None:
        _running.pack = self

    def __exit__(self, *_: object) -> None:
        del _running.pack

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: the pack itself begins anew each time. Positions come with the call."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append each job's part of [1, heads, tokens, width] to its own cache; attention follows at once."""
        self._index, self._layers = layer_idx, [cache.layers[layer_idx] for cache in self._caches]
        states = key_states, value_states
        abreast = self._abreast
        self._together = abreast if abreast and abreast.append(layer_idx, self._layers, states) else None
        done = self._together.jobs if self._together else ()
        self._held = {}
        if len(done) < len(self._layers):
            keys, values = map(self._of_jobs, states)
            for job, layer in enumerate(self._layers):
                if job not in done:
                    self._held[job] = layer.update(keys[job], values[job], *args, **kwargs)
        return states

    def attend(self, module: Any, query: torch.Tensor, scaling: float | None, **scores: Any) -> torch.Tensor:
        """Attention of each job's queries [1, heads, tokens, width] over its own keys: [1, tokens, heads, width]."""
        expand = getattr(module, "expand_kv", None)  # what is cached may be latent
        # Whatever writes its scores to memory does that for one job after the other, as the memory estimate has it.
        is_plain = expand is None and not any(each is not None for each in scores.values())
        together = self._together
        outputs: dict[int, torch.Tensor] = {}
        if together is not None and not is_plain:
            self._held |= {job: (self._layers[job].keys, self._layers[job].values) for job in together.jobs}
        elif together is not None:
            shared = together.attend(self._index, query, partial(_attend, scaling=scaling))
            if len(shared) == len(self._rows):
                return shared.squeeze(2).unsqueeze(0)
            outputs = dict(zip(together.jobs, torch.split(shared, 1), strict=True))
        for job, part in enumerate(self._of_jobs(query)):
            if job not in outputs:
                keys, values = self._held[job] if expand is None else expand(*self._held[job])
                outputs[job] = _attend(part, keys, values, self._mask(part, keys), scaling, **scores)
        found = [outputs[job] for job in range(len(outputs))]
        return (torch.cat(found, 2) if len(found) > 1 else found[0]).transpose(1, 2)

    def _of_jobs(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each job's part of [1, heads, tokens, width]."""
        return torch.split(states, self._rows, 2) if len(self._rows) > 1 else (states,)

    def _mask(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """What to add to the last positions' scores, [rows, length]; None where they see all keys.

        A windowed cache gives as many keys as the first of several rows sees.
        """
        rows, length = query.shape[2], keys.shape[2]
        window = getattr(self._layers[0], "sliding_window", 0)
        if rows == 1:
            return None
        key = (rows, length, window)
        if key not in self._masks:
            seen = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
            seen = seen.triu(length - rows - window + 1) if window else seen
            self._masks[key] = query.new_zeros(rows, length).masked_fill(~seen, float("-inf"))
        return self._masks[key]


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of [jobs, heads, rows, width] over [jobs, kv heads, length, width]; the mask is added to scores."""
    jobs, heads, rows, width = query.shape
    kv_heads = keys.shape[1]
    if softcap is not None or sinks is not None:
        return _attend_by_hand(query, keys, values, mask, scaling, softcap, sinks)
    if rows == 1:  # the heads that share keys take the place of rows
        shared = query.reshape(jobs, kv_heads, heads // kv_heads, width)
        mask = mask if mask is None else mask.expand(-1, -1, heads // kv_heads, -1)
        found = scaled_dot_product_attention(shared, keys, values, attn_mask=mask, scale=scaling)
        return found.reshape(jobs, heads, 1, values.shape[3])
    if heads != kv_heads:  # as transformers does it
        keys, values = (each.repeat_interleave(heads // kv_heads, 1) for each in (keys, values))
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def _attend_by_hand(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """With capped scores (Gemma 2), or with sinks [heads] that take a part of each row's weight (GPT-OSS)."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
    scores = query @ keys.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values
    sunk = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)], -1)
    return sunk.softmax(-1, dtype=torch.float32)[..., :-1].to(query.dtype) @ values


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    pack: Pack = _running.pack
    if attention_mask is not None or other.get("position_bias") is not None:
        raise InternalError(f"{type(module).__name__} gives its attention what a pack does not have")
    return pack.attend(module, query, scaling, softcap=softcap, sinks=s_aux), None


AttentionInterface.register(PACKED, _attention)


def can_pack(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether jobs of this model can share a forward pass; `cache` is one of theirs, empty."""
    kinds = [_rope_kinds(module) for module in model.modules()]
    return (
        model._supports_attention_backend
        and all(type(layer) in _PLAIN_LAYERS for layer in cache.layers)
        and _windows_are_plain(model)
        and not any(kind in _DEPENDENT_ROPE for found in kinds for kind in found)
    )


def _windows_are_plain(model: PreTrainedModel) -> bool:
    """Llama 4 attends in chunks, which its cache keeps as if they were windows."""
    types = getattr(model.config, "layer_types", None) or ()
    return set(types) <= {"full_attention", "sliding_attention"}


def _rope_kinds(module: torch.nn.Module) -> tuple[str, ...]:
    kinds = getattr(module, "rope_type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds.values() if isinstance(kinds, dict) else kinds)
