"""Attention of several jobs' decoded tokens in one call, where their caches lie in slots (see `slots`).

The call goes over as many positions as the longest of these jobs has; what a job does not have is masked. Slots that
follow one another are read where they lie, others are copied together first. Where that would be much more than what
there is, jobs are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import Cache

from azu.models.cache import ReservedLayer
from azu.models.slots import POSITIONS

__all__ = ["Abreast", "find_abreast"]

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Positions for each job that may be computed in vain: as many take about as long as a call for a job of its own.
_IN_VAIN = 96
_COPY_SHARE = 4  # positions that are copied take as long as one that is computed
_MOST_COPIED = 4_096  # positions: no more memory than a prompt takes


def find_abreast(caches: Sequence[Cache], rows: Sequence[int]) -> Abreast | None:
    """Those jobs of a pack for which one call pays; None if there are not two.

    Args:
        rows: of each job in the pack.
    """
    able: dict[int, ReservedLayer] = {}
    for job, (cache, count) in enumerate(zip(caches, rows, strict=True)):
        first = next((layer for layer in cache.layers if type(layer) is ReservedLayer), None)
        if count == 1 and first is not None and first.slot is not None and 0 < first.length < POSITIONS:
            able[job] = first
    chosen = sorted(able, key=lambda job: able[job].length)
    while len(chosen) > 1:
        found = Abreast({job: able[job] for job in sorted(chosen)}, rows)
        if found.in_vain <= _IN_VAIN * len(chosen) and found.copied <= _MOST_COPIED:
            return found
        del chosen[-1]
    return None


class Abreast:
    """Jobs of one stage, a token of each.

    Attributes:
        jobs: which they are, of a pack. in_vain: positions beyond those that jobs have, as much work as the call takes.
        copied: positions of each layer that are copied for the call.
    """

    def __init__(self, layers: dict[int, ReservedLayer], rows: Sequence[int]) -> None:
        self.jobs = list(layers)
        self._rows = rows
        self._lengths = [layer.length for layer in layers.values()]
        slots = [layer.slot for layer in layers.values() if layer.slot is not None]
        self._slots = slots[0].slots
        self._numbers = [slot.number for slot in slots]
        self._is_run = self._numbers == [*range(self._numbers[0], self._numbers[0] + len(slots))]
        self._longest = max(self._lengths) + 1
        positions = len(slots) * self._longest
        self.copied = 0 if self._is_run else positions
        self.in_vain = positions - sum(self._lengths) - len(slots) + self.copied // _COPY_SHARE

    def append(self, index: int, layers: Sequence[Any], states: Sequence[torch.Tensor]) -> bool:
        """Append the jobs' keys and values to their layers with this index; False where these do not lie in the slots.

        Args:
            layers: of all jobs of the pack.
            states: keys and values of the whole pack, [1, heads, tokens, width].
        """
        mine = [layers[job] for job in self.jobs]
        if type(mine[0]) is not ReservedLayer or [layer.slot and layer.length for layer in mine] != self._lengths:
            return False
        numbers, positions = self._at
        for kind, each in enumerate(states):
            new = each[0].transpose(0, 1)
            self._slots.rows(index, kind)[numbers, :, positions] = new if self._is_all else new[self._tokens]
        for layer in mine:
            layer.length += 1
        return True

    def attend(self, index: int, query: torch.Tensor, attention: Attention) -> torch.Tensor:
        """The jobs' attention, [jobs, heads, 1, width], of a whole pack's queries [1, heads, tokens, width].

        Args:
            attention: takes queries [jobs, heads, 1, width], keys and values [jobs, kv heads, positions, width] and
                what to add to scores [jobs, 1, 1, positions].
        """
        keys, values = (self._held(index, kind) for kind in range(2))
        queries = query.transpose(0, 2)
        if self._mask.dtype != query.dtype:
            self._mask = self._mask.to(query.dtype)
        return attention(queries if self._is_all else queries[self._tokens], keys, values, self._mask)

    def _held(self, index: int, kind: int) -> torch.Tensor:
        """The jobs' keys (kind 0) or values (kind 1) in a layer, [jobs, kv heads, positions, width]."""
        rows = self._slots.rows(index, kind)[:, :, : self._longest]
        if self._is_run:
            return rows[self._numbers[0] : self._numbers[0] + len(self.jobs)]
        return rows.index_select(0, self._at[0])

    @cached_property
    def _tokens(self) -> torch.Tensor:
        """Where in the pack the jobs' tokens are."""
        starts = torch.tensor(self._rows).cumsum(0) - torch.tensor(self._rows)
        return starts[self.jobs]

    @cached_property
    def _is_all(self) -> bool:
        """Whether these are all jobs of the pack."""
        return len(self.jobs) == len(self._rows)

    @cached_property
    def _at(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and positions of the new tokens."""
        return torch.tensor(self._numbers), torch.tensor(self._lengths)

    @cached_property
    def _mask(self) -> torch.Tensor:
        """What to add to scores, [jobs, 1, 1, positions]."""
        hidden = torch.arange(self._longest) > self._at[1].unsqueeze(1)
        return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).view(len(self.jobs), 1, 1, -1)
