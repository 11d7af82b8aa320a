"""Attention of several jobs' decoded tokens in one call, where their caches lie in slots (see `slots`).

The call goes over all slots from the first to the last of these jobs, and over as many positions as the longest has.
What a job does not have is masked. Where that would be much more than what there is, jobs are left out.
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
_IN_VAIN = 128


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
        if found.in_vain <= _IN_VAIN * len(chosen):
            return found
        del chosen[-1]
    return None


class Abreast:
    """Jobs of one stage, a token of each.

    Attributes:
        jobs: which they are, of a pack. in_vain: positions that are computed beside those that jobs have.
    """

    def __init__(self, layers: dict[int, ReservedLayer], rows: Sequence[int]) -> None:
        self.jobs = list(layers)
        self._rows = rows
        self._lengths = [layer.length for layer in layers.values()]
        slots = [layer.slot for layer in layers.values() if layer.slot is not None]
        self._slots = slots[0].slots
        self._numbers = [slot.number for slot in slots]
        self._first = min(self._numbers)
        self._count = max(self._numbers) + 1 - self._first
        self._longest = max(self._lengths) + 1
        self.in_vain = self._count * self._longest - sum(self._lengths) - len(self.jobs)

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
            attention: takes queries [slots, heads, 1, width], keys and values [slots, kv heads, positions, width] and
                what to add to scores [slots, 1, 1, positions].
        """
        reach = slice(self._first, self._first + self._count)
        keys, values = (self._slots.rows(index, kind)[reach, :, : self._longest] for kind in range(2))
        queries = query.transpose(0, 2)
        if not self._is_in_order:
            queries = queries[self._tokens_by_slot]
        if self._mask.dtype != query.dtype:
            self._mask = self._mask.to(query.dtype)
        found = attention(queries, keys, values, self._mask)
        return found if self._is_in_order else found[self._places]

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
    def _is_in_order(self) -> bool:
        """Whether the jobs are the pack's, and in the order of their slots, without one between."""
        return self._is_all and self._numbers == [*range(self._first, self._first + self._count)]

    @cached_property
    def _at(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and positions of the new tokens."""
        return torch.tensor(self._numbers), torch.tensor(self._lengths)

    @cached_property
    def _places(self) -> torch.Tensor:
        """The jobs' slots, counted from the first."""
        return torch.tensor(self._numbers) - self._first

    @cached_property
    def _tokens_by_slot(self) -> torch.Tensor:
        """Where in the pack the token of each slot is; any token for a slot that is none of these jobs'."""
        tokens = torch.zeros(self._count, dtype=torch.int64)
        tokens[self._places] = self._tokens
        return tokens

    @cached_property
    def _mask(self) -> torch.Tensor:
        """What to add to scores, [slots, 1, 1, positions]: nothing in slots that are none of these jobs', as where
        there is nothing to see the sum of weights would be zero.
        """
        seen = torch.full((self._count, 1), self._longest)
        seen[self._places, 0] = torch.tensor(self._lengths) + 1
        mask = torch.zeros(self._count, self._longest)
        return mask.masked_fill(torch.arange(self._longest) >= seen, float("-inf")).view(self._count, 1, 1, -1)
