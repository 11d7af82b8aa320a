"""Ways to place layers and to choose a job's workers, for the simulated swarm."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from azu.planning import Links, ModelShape, Placement, WorkerView, place
from azu.planning.snapshot import speeds
from coordinator.planning import find_route

__all__ = ["POLICIES", "Policy", "View"]

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Chain = list[tuple[int, int]]  # a worker's index and how many layers it runs


class View(Protocol):
    """What a policy sees of the swarm."""

    shape: ModelShape
    workers: list[WorkerView]
    hops: Matrix  # seconds from one worker to another
    links: Links  # what the workers measured of them


class Policy(Protocol):
    """One of them. `place` is asked at each step, `route` for one job's chain: None if no chain has room."""

    def place(self, view: View, chance: random.Random) -> Sequence[Placement]: ...

    def route(self, view: View, tokens: int, chance: random.Random) -> Chain | None: ...


@cache
def _windows(shape: ModelShape, vram: int) -> tuple[tuple[int, int], ...]:
    """All ranges of as many layers as fit in the middle, and at the model's ends, where fewer fit, as many as do."""
    n_layers = shape.n_layers
    count = 0
    while count < n_layers - 2 and shape.stage_bytes(1, 2 + count) <= vram:
        count += 1
    ends = [[(0, size) for size in range(count, 0, -1)], [(n_layers - size, n_layers) for size in range(count, 0, -1)]]
    largest = [next((each for each in side if shape.stage_bytes(*each) <= vram), None) for side in ends]
    middle = [(start, start + count) for start in range(1, n_layers - count)] if count else []
    return (*middle, *(each for each in largest if each))


def _with_room(workers: Sequence[WorkerView], tokens: int) -> list[int]:
    return [i for i, worker in enumerate(workers) if worker.ready and worker.held and worker.kv_tokens_free >= tokens]


class Random:
    """Neither speed nor place counts."""

    def place(self, view: View, chance: random.Random) -> list[Placement]:
        idle = [(worker, _windows(view.shape, worker.vram)) for worker in view.workers if worker.held is None]
        return [Placement(worker.peer_id, *chance.choice(windows)) for worker, windows in idle if windows]

    def route(self, view: View, tokens: int, chance: random.Random) -> Chain | None:
        able = _with_room(view.workers, tokens)
        chain: Chain = []
        layer = 0
        while layer < view.shape.n_layers:
            used = {index for index, _ in chain}
            next_ones = [i for i in able if i not in used and _covers(view.workers[i], layer)]
            if not next_ones:
                return None
            index = chance.choice(next_ones)
            end = (view.workers[index].held or (0, 0))[1]
            chain.append((index, end - layer))
            layer = end
        return chain


def _covers(worker: WorkerView, layer: int) -> bool:
    start, end = worker.held or (0, 0)
    return start <= layer < end


class Petals:
    """The least served layers when a worker joins; the shortest path over lines and layers."""

    def place(self, view: View, chance: random.Random) -> list[Placement]:
        shape, workers = view.shape, view.workers
        speed = speeds(workers)
        served = np.zeros(shape.n_layers)
        for worker in workers:
            if worker.held:
                served[slice(*worker.held)] += speed[worker.peer_id] / (worker.held[1] - worker.held[0])
        plan = []
        for worker in workers:
            windows = _windows(shape, worker.vram) if worker.held is None else []
            if windows:
                start, end = min(windows, key=lambda each: (sorted(served[slice(*each)]), each))
                served[start:end] += speed[worker.peer_id] / (end - start)
                plan.append(Placement(worker.peer_id, start, end))
        return plan

    def route(self, view: View, tokens: int, chance: random.Random) -> Chain | None:
        """Dynamic programming over layers, all that hold a layer at once."""
        able = np.array(_with_room(view.workers, tokens), dtype=int)
        start, end = np.array([view.workers[i].held or (0, 0) for i in able], dtype=int).reshape(-1, 2).T
        layer_s = np.array([view.workers[i].decode_s for i in able])
        hops = view.hops[np.ix_(able, able)]
        seconds = np.full(len(able), np.inf)  # of the best path that has come to each worker
        ways: list[_Way | None] = [None] * len(able)
        for layer in range(view.shape.n_layers):
            holds = (start <= layer) & (layer < end)
            if layer == 0:
                seconds[holds] = 0.0
                for i in np.flatnonzero(holds):
                    ways[i] = _Way(int(i), 0, None)
            # Whoever ran the layer before may be left; only the best few can be worth a hop.
            ran = np.flatnonzero((start < layer) & (layer <= end) & np.isfinite(seconds))
            for other in ran[np.argsort(seconds[ran])[:4]]:
                total = seconds[other] + hops[other]
                for i in np.flatnonzero(holds & (total < seconds)):
                    if not _comes_by(ways[other], int(i)):
                        seconds[i], ways[i] = total[i], _Way(int(i), layer, ways[other])
            seconds[holds] += layer_s[holds]
            if not np.isfinite(seconds[holds]).any():
                return None
        way = ways[int(np.argmin(np.where(end == view.shape.n_layers, seconds, np.inf)))]
        chain: Chain = []
        border = view.shape.n_layers
        while way is not None:
            chain.append((int(able[way.worker]), border - way.layer))
            border, way = way.layer, way.before
        return chain[::-1]


class _Way(NamedTuple):
    """A worker that was entered at a layer, and the way to it."""

    worker: int
    layer: int
    before: _Way | None


def _comes_by(way: _Way | None, worker: int) -> bool:
    while way is not None:
        if way.worker == worker:
            return True
        way = way.before
    return False


class Azu:
    """The coordinator's own planner."""

    def place(self, view: View, chance: random.Random) -> Sequence[Placement]:
        return place(view.shape, view.workers, view.links)

    def route(self, view: View, tokens: int, chance: random.Random) -> Chain | None:
        found = find_route(view.shape.n_layers, view.workers, tokens, links=view.links, parts=True)
        if found is None:
            return None
        index = {worker.peer_id: i for i, worker in enumerate(view.workers)}
        return [(index[stage.peer_id], stage.end - stage.start) for stage in found.stages]


POLICIES: Mapping[str, Policy] = {"random": Random(), "Petals": Petals(), "azu": Azu()}
