"""Who should hold which layers, and which workers run a job. Pure: a snapshot goes in, decisions come out.

Placement covers layers 0..L with the fewest workers, since every further stage costs each token a hop, and among those
plans takes the one whose largest stage (in layers) is smallest. Both hold exactly where a model's layers are of one
size, whatever embeddings and head weigh; where they differ, the plan fits but may be larger than need be. What is
already loaded stays where it is, unless the holes cannot be filled by idle workers but a plan from scratch would cover
the model; holes are filled one by one, the largest first. Workers left over hold replicas of the ranges that hang on
the fewest workers.

Complexity: O(W log L) memory estimates for each number of stages that is tried, for W workers and L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from azu.models.memory import MAX_JOBS

__all__ = ["ModelShape", "Placement", "WorkerView", "holes", "place", "route", "uncovered"]

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the planner knows of a model. `stage_bytes(start, end)` is a stage's memory with its KV cache, in bytes."""

    n_layers: int
    stage_bytes: Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the planner knows of a worker, for one model.

    `held` is the range that it has loaded or is loading, `ready` whether it can run it; `cached` what lies on its disk.
    Workers that hold layers of another model are not passed in at all.
    """

    peer_id: str
    vram: int
    held: Range | None = None
    ready: bool = False
    cached: Range | None = None
    jobs: int = 0
    kv_tokens_free: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Layers [start, end) that a worker should load."""

    peer_id: str
    start: int
    end: int


def place(shape: ModelShape, workers: Sequence[WorkerView]) -> tuple[Placement, ...]:
    """The assignments to give now; empty when there is nothing to change or nothing that would help."""
    workers = [worker for worker in workers if worker.held is None or _is_range(worker.held, shape.n_layers)]
    kept = _chain(shape.n_layers, [worker for worker in workers if worker.held])
    idle = [worker for worker in workers if worker.held is None]
    taken: list[Placement] = []
    missing = holes(shape.n_layers, [range_ for worker in kept if (range_ := worker.held)])
    for start, end in sorted(missing, key=lambda range_: range_[0] - range_[1]):
        used = {placement.peer_id for placement in taken}
        filled = _cover(shape, [worker for worker in idle if worker.peer_id not in used], start, end)
        if filled is None:
            return _from_scratch(shape, workers)
        taken += filled
    return (*taken, *_replicate(shape, idle, taken, workers))


def _from_scratch(shape: ModelShape, workers: Sequence[WorkerView]) -> tuple[Placement, ...]:
    held = {worker.peer_id: worker.held for worker in workers}
    plan = _cover(shape, workers, 0, shape.n_layers) or ()
    return tuple(placement for placement in plan if held[placement.peer_id] != (placement.start, placement.end))


def route(n_layers: int, workers: Sequence[WorkerView], tokens: int) -> tuple[Placement, ...] | None:
    """A chain of ready workers that covers the model and has room for one more job of `tokens` positions each, or None.

    Of the chains it takes one with the fewest stages, and of replicas the one with the fewest jobs.
    """
    roomy = [w for w in workers if w.ready and w.kv_tokens_free >= tokens and w.jobs < MAX_JOBS]
    if uncovered(n_layers, roomy):
        return None
    chain = _chain(n_layers, roomy)
    return tuple(Placement(worker.peer_id, *worker.held) for worker in chain if worker.held)


def uncovered(n_layers: int, workers: Sequence[WorkerView]) -> tuple[Range, ...]:
    """The [start, end) stretches of layers that no ready worker can run, in the best chain that there is.

    Ranges that overlap do not make a chain: what a job cannot be routed through is not covered.
    """
    chain = _chain(n_layers, [worker for worker in workers if worker.ready])
    return holes(n_layers, [worker.held for worker in chain if worker.held])


def holes(n_layers: int, ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The [start, end) stretches of layers 0..n_layers that no range covers; ranges outside of them do not count."""
    missing: list[Range] = []
    position = 0
    for start, end in sorted(range_ for range_ in ranges if _is_range(range_, n_layers)):
        if start > position:
            missing.append((position, start))
        position = max(position, end)
    if position < n_layers:
        missing.append((position, n_layers))
    return tuple(missing)


def _is_range(range_: Range, n_layers: int) -> bool:
    """Whether these are layers of the model at all; a worker's record could claim anything."""
    return 0 <= range_[0] < range_[1] <= n_layers


def _chain(n_layers: int, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Non-overlapping workers that cover the most layers, then with the fewest stages, then with the fewest jobs.

    Weighted interval scheduling over layer positions.
    """
    by_end: dict[int, list[WorkerView]] = {}
    for worker in sorted(workers, key=lambda worker: worker.peer_id):
        if worker.held and _is_range(worker.held, n_layers):
            by_end.setdefault(worker.held[1], []).append(worker)
    # best[p]: (layers covered below p, -stages, -jobs) and the worker that ends the chain there, None for a gap.
    best: list[tuple[tuple[int, int, int], WorkerView | None]] = [((0, 0, 0), None)]
    for position in range(1, n_layers + 1):
        choice: tuple[tuple[int, int, int], WorkerView | None] = (best[position - 1][0], None)
        for worker in by_end.get(position, ()):
            start = worker.held[0] if worker.held else 0
            covered, stages, jobs = best[start][0]
            score = (covered + position - start, stages - 1, jobs - worker.jobs)
            if score > choice[0]:
                choice = (score, worker)
        best.append(choice)
    chain: list[WorkerView] = []
    position = n_layers
    while position > 0:
        last = best[position][1]
        if last is None or last.held is None:
            position -= 1
        else:
            chain.append(last)
            position = last.held[0]
    return chain[::-1]


@dataclass(frozen=True, slots=True)
class _Room:
    """How many layers of a stretch a worker can hold, as its first, a middle or its last stage.

    The model's ends weigh more than its layers: embeddings lie in the first stage, norm and head in the last.
    """

    worker: WorkerView
    first: int
    middle: int
    last: int


def _cover(shape: ModelShape, workers: Sequence[WorkerView], start: int, end: int) -> list[Placement] | None:
    """Cover layers [start, end) by the fewest of these workers with the smallest largest stage, or None."""
    # Workers of equal memory take their ranges in the order of what they have cached, so that a restart moves nothing.
    ordered = sorted(workers, key=lambda worker: (-worker.vram, worker.cached or (shape.n_layers, 0), worker.peer_id))
    rooms = [_room(shape, worker, start, end) for worker in ordered[: end - start]]
    for count in range(1, len(rooms) + 1):
        plan = _fill(shape, _in_order(rooms[:count], end - start), start, end, end - start)
        if plan is None:
            continue
        low, high = 1, end - start
        while low < high:
            middle = (low + high) // 2
            smaller = _fill(shape, _in_order(rooms[:count], middle), start, end, middle)
            if smaller is None:
                low = middle + 1
            else:
                plan, high = smaller, middle
        return plan
    return None


def _room(shape: ModelShape, worker: WorkerView, start: int, end: int) -> _Room:
    return _Room(
        worker,
        first=_largest_end(shape, worker.vram, start, end - 1) - start,
        middle=max(0, _largest_end(shape, worker.vram, start + 1, end - 1) - (start + 1)),
        last=end - _smallest_start(shape, worker.vram, start + 1, end),
    )


def _in_order(rooms: Sequence[_Room], most: int) -> list[WorkerView]:
    """The workers in the order in which they hold the most together, if none holds more than `most` layers.

    What counts is who takes the ends: there a worker loses some of the layers that it would hold in the middle.
    """
    indices = range(len(rooms))
    at_first = {i: min(rooms[i].middle, most) - min(rooms[i].first, most) for i in indices if rooms[i].first}
    at_last = {i: min(rooms[i].middle, most) - min(rooms[i].last, most) for i in indices if rooms[i].last}
    # Two candidates for each end suffice: the best of one end may be the best of the other too.
    firsts = sorted(at_first, key=lambda i: (at_first[i], i))[:2]
    lasts = sorted(at_last, key=lambda i: (at_last[i], -i))[:2]
    pairs = [(at_first[i] + at_last[j], i, -j) for i in firsts for j in lasts if i != j]
    if not pairs:
        return [room.worker for room in rooms]
    _, first, last = min(pairs)
    middle = [room.worker for i, room in enumerate(rooms) if i not in (first, -last)]
    return [rooms[first].worker, *middle, rooms[-last].worker]


def _fill(shape: ModelShape, workers: Sequence[WorkerView], start: int, end: int, most: int) -> list[Placement] | None:
    """Give each worker in turn as many layers as fit, at most `most`; None if layers are left over."""
    placements: list[Placement] = []
    position = start
    for worker in workers:
        stop = _largest_end(shape, worker.vram, position, min(end, position + most))
        if stop > position:
            placements.append(Placement(worker.peer_id, position, stop))
        position = stop
    return placements if position == end else None


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


def _replicate(
    shape: ModelShape, idle: Sequence[WorkerView], taken: Sequence[Placement], workers: Sequence[WorkerView]
) -> list[Placement]:
    """A range for each idle worker that filled no hole: the one held by the fewest, of those that fit it."""
    held: dict[Range, int] = {}
    for range_ in [(p.start, p.end) for p in taken] + [worker.held for worker in workers if worker.held]:
        held[range_] = held.get(range_, 0) + 1
    used = {placement.peer_id for placement in taken}
    replicas: list[Placement] = []
    for worker in sorted(idle, key=lambda worker: worker.peer_id):
        fitting = [range_ for range_ in held if shape.stage_bytes(*range_) <= worker.vram]
        if worker.peer_id in used or not fitting:
            continue
        cached = worker.cached
        chosen = min(fitting, key=lambda range_: (held[range_], range_ != cached, range_))
        held[chosen] += 1
        replicas.append(Placement(worker.peer_id, *chosen))
    return replicas
