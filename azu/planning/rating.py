"""How good a plan is for a small swarm, in this order:

**Safety.** Every layer is held by somebody, by two workers, by workers of two networks.
**Tokens per second.** The most that can go through all layers in parts of what workers hold (see `parts`).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from math import inf
from typing import NamedTuple

from azu.planning.levels import SPREAD
from azu.planning.parts import Parts
from azu.planning.snapshot import ModelShape, Power, Range, WorkerView
from azu.planning.steps import Steps
from azu.planning.windows import Windows

__all__ = ["Held", "Rater", "Score"]

Held = Mapping[str, Range]  # by peer id; who holds nothing is not in it

_NOTICEABLY = 1.001


class Score(NamedTuple):
    """How good a plan is: its safety from 0 (a layer is missing) to 3 (spread over networks), and tokens per second, of
    which only plans of one snapshot are compared: units differ.
    """

    safety: int
    rate: float

    def beats(self, other: Score) -> bool:
        """Whether it is better by more than nothing."""
        if self.safety != other.safety:
            return self.safety > other.safety
        return self.rate > other.rate * _NOTICEABLY

    def goal(self, safety: int) -> float:
        """A plan that is so safe is better with more tokens per second than these."""
        if safety != self.safety:
            return inf if safety < self.safety else 0.0
        return self.rate * _NOTICEABLY


class Rater:
    """What plans for a model are worth, and who could hold what.

    Attributes:
        windows: by peer id, the ranges that fit to which no layer can be added.
    """

    def __init__(self, shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]) -> None:
        self.n_layers = shape.n_layers
        self._power = power
        fitting = Windows(shape)
        menus = {worker.peer_id: fitting.of(worker.vram) for worker in workers}
        self.windows = {peer_id: menu.windows for peer_id, menu in menus.items()}
        self._most = {peer_id: menu.most for peer_id, menu in menus.items()}
        self._shape = shape
        self._vram = {worker.peer_id: worker.vram for worker in workers}
        self._networks = {worker.peer_id: worker.network or worker.peer_id for worker in workers}
        self._numbers = {worker.peer_id: number for number, worker in enumerate(workers)}

    @cached_property
    def _times(self) -> list[list[float]]:
        """Of each worker through so many layers, in what a token usually takes: `Parts` wants numbers around 1."""
        rates = [self._power[peer_id].rate(most, self.n_layers) for peer_id, most in self._most.items() if most]
        usual = statistics.median(rates or [1.0])
        counts = range(1, self.n_layers + 1)
        return [[0.0, *(usual / self._power[peer].rate(n, self.n_layers) for n in counts)] for peer in self._most]

    def fits(self, peer_id: str, start: int, end: int) -> bool:
        """Whether a worker could hold these layers; False where there are no such layers."""
        exists = 0 <= start < end <= self.n_layers
        return exists and self._shape.stage_bytes(start, end) <= self._vram[peer_id]

    def most(self, peer_id: str) -> int:
        """How many layers a worker can hold."""
        return self._most[peer_id]

    def able(self, peer_ids: Iterable[str]) -> list[str]:
        """Those that can hold a layer, the largest first."""
        return sorted((p for p in peer_ids if self._most[p]), key=lambda p: (-self._most[p], p))

    def network(self, peer_id: str) -> str:
        """Which workers may fail together with it."""
        return self._networks[peer_id]

    def number(self, peer_id: str) -> int:
        """Which worker of `Parts` it is."""
        return self._numbers[peer_id]

    def parts(self, held: Held) -> Parts:
        """What flows through a plan."""
        found = Parts(self._times)
        for peer_id, range_ in held.items():
            found.give(self._numbers[peer_id], range_)
        return found

    def score(self, held: Held) -> Steps[Score]:
        """See `Score`."""
        flow = yield from self.parts(held).flow()
        return Score(self.safety(held), flow)

    def safety(self, held: Held) -> int:
        """See `Score`."""
        networks: dict[str, int] = defaultdict(int)
        once = twice = 0
        for peer_id, (start, end) in held.items():
            layers = (1 << end) - (1 << start)
            twice |= once & layers
            once |= layers
            networks[self._networks[peer_id]] |= layers
        every = (1 << self.n_layers) - 1
        if twice != every:
            return int(once == every)
        one = spread = 0
        for layers in networks.values():
            spread |= one & layers
            one |= layers
        return SPREAD if spread == every else 2

    def safest(self, held: Held, others: Collection[str]) -> int:
        """How safe a plan can become, about, once others hold something too: never less than it can."""
        if not others:
            return self.safety(held)
        times = [0] * self.n_layers
        for start, end in held.values():
            for layer in range(start, end):
                times[layer] += 1
        layers = sum(self._most[peer_id] for peer_id in others)
        never = times.count(0)
        if never > layers:
            return 0
        return SPREAD if 2 * never + times.count(1) <= layers else 1

    def widened(self, held: Held, free: Iterable[str]) -> dict[str, Range]:
        """The same, where free workers hold what fits beside their layers too."""
        wide = dict(held)
        for peer_id in free:
            start, end = held.get(peer_id, (0, self.n_layers + 1))
            around = (window for window in self.windows[peer_id] if window[0] <= start and end <= window[1])
            if (window := next(around, None)) is not None:
                wide[peer_id] = window
        return wide
