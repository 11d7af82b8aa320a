"""The most tokens that can go through all layers at once, whatever the ranges."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from azu.planning.snapshot import Range

__all__ = ["largest_flow"]

_NOTHING = 1e-12


def largest_flow(n_layers: int, held: Iterable[tuple[Range, float]]) -> float:
    """The largest flow from layer 0 to the end, each range an edge that takes so many tokens per second.

    Edmonds and Karp (1972), O(L E²) for E distinct ranges, which borders in common keep few.
    """
    room: dict[int, dict[int, float]] = {0: {}, n_layers: {}}
    for (start, end), rate in held:
        there = room.setdefault(start, {})
        there[end] = there.get(end, 0.0) + rate
        room.setdefault(end, {}).setdefault(start, 0.0)
    total = 0.0
    while path := _path(room, n_layers):
        more = min(room[one][other] for one, other in path)
        for one, other in path:
            room[one][other] -= more
            room[other][one] += more
        total += more
    return total


def _path(room: dict[int, dict[int, float]], end: int) -> list[tuple[int, int]]:
    """The shortest way from 0 with room on all of it; empty where there is none."""
    before = {0: 0}
    queue = deque([0])
    while queue and end not in before:
        here = queue.popleft()
        for other, left in room[here].items():
            if left > _NOTHING and other not in before:
                before[other] = here
                queue.append(other)
    path: list[tuple[int, int]] = []
    while end in before and end:
        path.append((before[end], end))
        end = before[end]
    return path
