"""Which layers fit in how much memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from azu.planning.snapshot import ModelShape, Range

__all__ = ["Menu", "Windows"]


class Menu(NamedTuple):
    """The ranges that fit to which no layer can be added, how many layers the longest has, and how many there are."""

    windows: tuple[Range, ...]
    most: int
    lengths: frozenset[int]
    ends: Mapping[int, int]  # of each, by its start


class Windows:
    """Which ranges fit in so many bytes."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._found: dict[object, Menu] = {}
        n_layers, size = shape.n_layers, shape.stage_bytes
        middles = {size(layer, layer + 1) for layer in range(1, n_layers - 1)}
        self._is_even = len(middles) == 1
        # Bytes of 1, 2, ... layers as the first, a middle and the last stage, and of all of them.
        self._first = [size(0, end) for end in range(1, n_layers)]
        self._middle = [size(1, end) for end in range(2, n_layers)]
        self._last = [size(start, n_layers) for start in range(n_layers - 1, 0, -1)]
        self._whole = size(0, n_layers)

    def of(self, vram: int) -> Menu:
        """What fits."""
        counts = [bisect_right(sizes, vram) for sizes in (self._first, self._middle, self._last, [self._whole])]
        key = tuple(counts) if self._is_even else vram
        if key not in self._found:
            ranges = tuple(self._even(*counts) if self._is_even else self._uneven(vram))
            lengths = frozenset(end - start for start, end in ranges)
            self._found[key] = Menu(ranges, max(lengths, default=0), lengths, dict(ranges))
        return self._found[key]

    def _even(self, first: int, middle: int, last: int, whole: int) -> Iterator[Range]:
        n_layers = self._shape.n_layers
        if whole:
            yield 0, n_layers
            return
        if first:
            yield 0, first
        # A range that begins later and ends no later would be a part of another one.
        if middle:
            yield from (
                (start, start + middle)
                for start in range(1, n_layers - middle)
                if start + middle > first and start < n_layers - last
            )
        if last:
            yield n_layers - last, n_layers

    def _uneven(self, vram: int) -> Iterator[Range]:
        end = 0
        for start in range(self._shape.n_layers):
            before, end = end, max(end, start)
            while end < self._shape.n_layers and self._shape.stage_bytes(start, end + 1) <= vram:
                end += 1
            if end > max(before, start):
                yield start, end
