"""A chain of workers for a stretch of layers: as few as can be, since every further stage costs each token a hop, and
among those the chain whose slowest stage is fastest.

Both hold exactly where a model's layers are of one size, whatever embeddings and head weigh and however workers differ;
where layers differ, the plan fits but may be larger or slower than need be. Where idle workers' disks hold a chain that
is about as good, it is taken.

Complexity: O(W log L) memory estimates for W workers and L layers, then O(S W + S² log L) for chains of S stages.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from azu.planning.coverage import best_chain, holes
from azu.planning.snapshot import ModelShape, Placement, Power, WorkerView

__all__ = ["CACHED_IS_WORTH", "cover", "slowest"]

# What lies on a disk need not travel: it is taken where it is at least so fast as what would be best.
CACHED_IS_WORTH = 0.8
_STEPS = 40  # of the bisection: until the speed is known to a millionth
_CLOSE = 1 + 1e-6


@dataclass(frozen=True, slots=True)
class _Room:
    """How many layers of a stretch a worker can hold, as its first, a middle or its last stage.

    The model's ends weigh more than its layers: embeddings lie in the first stage, norm and head in the last.
    """

    worker: WorkerView
    power: Power
    first: int
    middle: int
    last: int

    def within(self, rate: float) -> tuple[int, int, int]:
        """The same, where the stage must not be slower than `rate` tokens per second."""
        most = self.power.most_layers(rate) if rate else self.middle + self.first + self.last
        return min(self.first, most), min(self.middle, most), min(self.last, most)


def slowest(shape: ModelShape, plan: Sequence[Placement], power: Mapping[str, Power]) -> float:
    """Tokens per second of a chain's slowest stage."""
    return min(power[p.peer_id].rate(p.end - p.start, shape.n_layers) for p in plan)


def cover(
    shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power], start: int, end: int, stages: int = 0
) -> list[Placement] | None:
    """Cover layers [start, end) by the fewest of these workers with the fastest slowest stage, or None.

    Args:
        stages: where it is more than the fewest, by no more than so many.
    """
    # Workers of equal memory take their ranges in the order of what they have cached, so that a restart moves nothing.
    ordered = sorted(workers, key=lambda w: (-w.vram, min(w.cached, default=(shape.n_layers, 0)), w.peer_id))
    rooms = _rooms(shape, ordered, power, start, end)
    plan = _fewest(shape, rooms, start, end)
    if plan is None:
        return None
    plan = _fastest(shape, rooms, plan, power, max(stages, len(plan)))
    cached = _from_disks(shape, workers, start, end)
    if cached and len(cached) <= len(plan) and _is_worth_it(shape, cached, plan, power):
        return cached
    return plan


def _rooms(
    shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power], start: int, end: int
) -> list[_Room]:
    sizes: dict[int, tuple[int, int, int]] = {}
    for vram in {worker.vram for worker in workers}:
        sizes[vram] = (
            _largest_end(shape, vram, start, end - 1) - start,
            max(0, _largest_end(shape, vram, start + 1, end - 1) - (start + 1)),
            end - _smallest_start(shape, vram, start + 1, end),
        )
    return [_Room(worker, power[worker.peer_id], *sizes[worker.vram]) for worker in workers]


def _fewest(shape: ModelShape, rooms: Sequence[_Room], start: int, end: int) -> list[Placement] | None:
    """The first plan that fits, of the workers with the most memory. `rooms` by memory, the largest first."""
    for count in range(1, min(len(rooms), end - start) + 1):
        chosen = _choose(rooms[:count], count, 0.0)
        plan = _fill(shape, chosen, start, end, 0.0)
        if plan is not None:
            return plan
    return None


def _fastest(
    shape: ModelShape, rooms: Sequence[_Room], plan: list[Placement], power: Mapping[str, Power], count: int
) -> list[Placement]:
    """A plan of so many stages at most whose slowest stage is as fast as can be, by bisection over its speed."""
    start, end = plan[0].start, plan[-1].end
    if len(plan) == 1:
        able = [room for room in rooms if shape.stage_bytes(start, end) <= room.worker.vram]
        best = max(able, key=lambda room: room.power.rate(end - start, shape.n_layers))
        plan = [Placement(best.worker.peer_id, start, end)]
        if count == 1:
            return plan
    rooms = _undominated(rooms, count, end - start)
    low = slowest(shape, plan, power)
    high = sum(heapq.nlargest(count, (room.power.speed for room in rooms))) / (end - start) * _CLOSE
    for _ in range(_STEPS):
        if high <= low * _CLOSE:
            break
        rate = (low + high) / 2
        faster = _fill(shape, _choose(rooms, count, rate), start, end, rate)
        if faster is None or len(faster) > count:
            high = rate
        else:
            plan, low = faster, max(rate, slowest(shape, faster, power))
    return plan


def _undominated(rooms: Sequence[_Room], count: int, most: int) -> list[_Room]:
    """The workers without those that `count` others surpass in memory, and in speed with any layers up to so many.

    `rooms` as in `_fewest`. A stage's time is linear in its layers, so one and the most are enough to look at.
    """
    kept: list[_Room] = []
    times: list[tuple[float, float]] = []
    for room in rooms:
        one, all_ = (layers / room.power.speed + room.power.away_s for layers in (1, most))
        if sum(other[0] <= one and other[1] <= all_ for other in times) < count:
            kept.append(room)
            times.append((one, all_))
    return kept


def _choose(rooms: Sequence[_Room], count: int, rate: float) -> list[_Room]:
    """`count` workers, in the order in which they hold the most layers together, none slower than `rate`.

    What counts is who takes the ends: there a worker loses some of the layers that it would hold in the middle.
    """
    sizes = [room.within(rate) for room in rooms]
    # Three more than are needed: two of them may go to the ends.
    best = heapq.nsmallest(count + 2, range(len(rooms)), key=lambda i: (-sizes[i][1], i))
    inside, least = set(best[:count]), sizes[best[min(count, len(best)) - 1]][1]
    loss = [size[1] if i in inside else least for i, size in enumerate(sizes)]
    firsts = heapq.nsmallest(3, (i for i in range(len(rooms)) if sizes[i][0]), key=lambda i: (loss[i] - sizes[i][0], i))
    lasts = heapq.nsmallest(3, (i for i in range(len(rooms)) if sizes[i][2]), key=lambda i: (loss[i] - sizes[i][2], -i))
    chains = []
    for first in firsts:
        for last in lasts:
            if first != last:
                middle = [i for i in best if i not in (first, last)][: count - 2]
                held = sizes[first][0] + sizes[last][2] + sum(sizes[i][1] for i in middle)
                chains.append((-held, first, -last, sorted(middle)))
    if not chains:
        return [rooms[i] for i in sorted(best[:count])]
    _, first, last, middle = min(chains)
    return [rooms[first], *(rooms[i] for i in middle), rooms[-last]]


def _fill(shape: ModelShape, rooms: Sequence[_Room], start: int, end: int, rate: float) -> list[Placement] | None:
    """Give each worker in turn as many layers as fit and are not slower than `rate`; None if layers are left over."""
    placements: list[Placement] = []
    position = start
    for room in rooms:
        most = room.power.most_layers(rate) if rate else end
        stop = _largest_end(shape, room.worker.vram, position, min(end, position + most))
        if stop > position:
            placements.append(Placement(room.worker.peer_id, position, stop))
        position = stop
    return placements if position == end else None


def _is_worth_it(
    shape: ModelShape, cached: Sequence[Placement], plan: Sequence[Placement], power: Mapping[str, Power]
) -> bool:
    return slowest(shape, cached, power) >= CACHED_IS_WORTH * slowest(shape, plan, power)


def _from_disks(shape: ModelShape, workers: Sequence[WorkerView], start: int, end: int) -> list[Placement] | None:
    """The chain with the fewest stages of what these workers have cached, if it covers [start, end)."""
    held = [
        replace(worker, held=range_)
        for worker in workers
        for range_ in worker.cached
        if start <= range_[0] < range_[1] <= end and shape.stage_bytes(*range_) <= worker.vram
    ]
    chain = best_chain(shape.n_layers, held)
    ranges = [worker.held for worker in chain if worker.held]
    if len({worker.peer_id for worker in chain}) < len(chain) or any(
        first < end and start < last for first, last in holes(shape.n_layers, ranges)
    ):
        return None
    return [Placement(worker.peer_id, *worker.held) for worker in chain if worker.held]


def _largest_end(shape: ModelShape, vram: int, start: int, limit: int) -> int:
    """The largest end <= limit such that layers [start, end) fit in `vram` bytes; `start` if not even one does."""
    low, high = start, limit
    while low < high:
        middle = (low + high + 1) // 2
        if shape.stage_bytes(start, middle) <= vram:
            low = middle
        else:
            high = middle - 1
    return low


def _smallest_start(shape: ModelShape, vram: int, limit: int, end: int) -> int:
    """The smallest start >= limit such that layers [start, end) fit in `vram` bytes; `end` if not even one does."""
    low, high = limit, end
    while low < high:
        middle = (low + high) // 2
        if shape.stage_bytes(middle, end) <= vram:
            high = middle
        else:
            low = middle + 1
    return low
