"""How many tokens per second each layer has, and which layers a further worker should hold, so that all have as many.

A job may enter and leave a worker at any border, and run a part of what it holds. So what a swarm gives is limited by
layers that have little, not by ranges that do not meet: where they do not, a worker is used for a part, which costs a
hop more. A worker gives most, hops counted, with as many layers as it can hold. Hence:

    price of a layer = what it lacks to what all would have, if all workers' ranges came out even (and a share of that)
    worth of a range = its tokens per second x the prices of its layers, and what it saves by meeting others at its ends

Prices are those of Lagrange multipliers: at those of the best plan, each worker holds what is worth most to it.

Layers that hang on nobody, one worker or one network come before all that. Tokens are whole numbers of billionths per
second, so that the same ranges have the same sums, in whatever order they came.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from azu.planning.chain import CACHED_IS_WORTH
from azu.planning.snapshot import ModelShape, Power, Range, WorkerView
from azu.planning.windows import Menu, Windows

__all__ = ["SPREAD", "Levels", "Pricing"]

# A layer's safety: nobody runs it, one worker, several in one network, workers in several networks.
_NOBODY, _SINGLE, _TOGETHER, SPREAD = range(4)
# How much it counts that a layer gets a first, a second, a third worker; one of another network than all before counts
# 1. Beside that, tokens are next to nothing.
_SAFER = (1_000.0, 30.0, 0.0)
_UNIT = 1e9
_MEETING = 0.2  # of a hop is lost where two ranges do not meet, about
_SHORTEST = 0.7  # of the layers that a worker could hold: as few may be better, where both ends meet others


class Pricing(NamedTuple):
    """What counts beside what layers lack when ranges are chosen; which is best differs from swarm to swarm.

    Attributes:
        floor: a layer's price where it lacks nothing, as a share of what all would have.
        meeting: how much of a hop it is worth that two ranges meet.
    """

    floor: float = 0.3
    meeting: float = _MEETING


class Levels:
    """The layers of a model with who holds them.

    Attributes:
        held: by peer id. tokens: per second, of each layer. ways: how many workers hold it.
    """

    def __init__(
        self,
        shape: ModelShape,
        workers: Sequence[WorkerView],
        power: Mapping[str, Power],
        pricing: Pricing = Pricing(),  # noqa: B008 - frozen
    ) -> None:
        self.n_layers = n_layers = shape.n_layers
        self.held: dict[str, Range] = {}
        self.tokens = [0] * n_layers
        self.ways = [0] * n_layers
        self._networks: list[dict[str, int]] = [{} for _ in range(n_layers)]
        self._safe = 0  # layers with workers of two networks
        self._surplus = [0] * (n_layers + 1)  # tokens that end at a border beyond those that begin there
        self._shape = shape
        self._power = power
        self._pricing = pricing
        self._rates: dict[str, dict[int, int]] = {worker.peer_id: {} for worker in workers}
        sizes = Windows(shape)
        self._menus = {worker.peer_id: sizes.of(worker.vram) for worker in workers}
        most = {peer: (menu.most, self.rate(peer, menu.most)) for peer, menu in self._menus.items() if menu.most}
        self._even = sum(size * rate for size, rate in most.values()) // n_layers or 1  # what all layers would have
        self._top = int(self._even * (1 + pricing.floor))
        self._prices = [float(self._top)] * n_layers
        # How much meets what begins at a border, or ends there, up to what one worker usually gives.
        self._usual = sum(rate for _, rate in most.values()) // max(1, len(most)) or 1
        self._begin, self._end = [0.0] * (n_layers + 1), [0.0] * (n_layers + 1)
        self._begin[0] = self._end[-1] = float(self._usual)

    def rate(self, peer_id: str, layers: int) -> int:
        """Billionths of a token per second that a worker adds to so many layers."""
        known = self._rates[peer_id]
        if layers not in known:
            known[layers] = round(self._power[peer_id].rate(layers, self.n_layers) * _UNIT)
        return known[layers]

    def most(self, peer_id: str) -> int:
        """How many layers a worker can hold."""
        return self._menus[peer_id].most

    def put(self, worker: WorkerView, range_: Range) -> None:
        """Have a worker hold these layers."""
        self.held[worker.peer_id] = range_
        self._change(worker, range_, 1)

    def take(self, worker: WorkerView) -> Range:
        """Have it hold nothing; what it held."""
        range_ = self.held.pop(worker.peer_id)
        self._change(worker, range_, -1)
        return range_

    def _change(self, worker: WorkerView, range_: Range, sign: int) -> None:
        start, end = range_
        rate = sign * self.rate(worker.peer_id, end - start)
        network = worker.network or worker.peer_id
        for layer in range(start, end):
            self.tokens[layer] = tokens = self.tokens[layer] + rate
            self._prices[layer] = float(self._top - tokens) if tokens < self._top else 0.0
            self.ways[layer] += sign
            there = self._networks[layer]
            self._safe -= len(there) >= _TOGETHER
            there[network] = there.get(network, 0) + sign
            if not there[network]:
                del there[network]
            self._safe += len(there) >= _TOGETHER
        self._surplus[start] -= rate
        self._surplus[end] += rate
        for border in range_:
            if 0 < border < self.n_layers:
                surplus = self._surplus[border]
                self._begin[border] = float(min(max(surplus, 0), self._usual))
                self._end[border] = float(min(max(-surplus, 0), self._usual))

    def worth(self) -> float:
        """Tokens per second, about: the layers' mean, of each no more than all would have, less the further hops."""
        found = sum(min(tokens, self._even) for tokens in self.tokens)
        hops = [self._power[peer_id].away_s * self._power[peer_id].speed for peer_id in self.held]
        apart = sum(abs(surplus) for surplus in self._surplus[1:-1])
        return (found - _MEETING * fmean(hops) * apart) / self.n_layers / _UNIT if hops else 0.0

    def safety(self, layer: int) -> int:
        """How many must fail before nobody runs a layer: see SPREAD."""
        return min(self.ways[layer], _TOGETHER) if len(self._networks[layer]) < _TOGETHER else SPREAD

    def can_spare(self, worker: WorkerView, layers: Iterator[int]) -> bool:
        """Whether these layers stay as safe, and off a single worker, without one that holds them."""
        network = worker.network or worker.peer_id
        return all(
            self.ways[layer] > _TOGETHER
            and not (len(self._networks[layer]) == _TOGETHER and self._networks[layer][network] == 1)
            for layer in layers
        )

    def best(self, worker: WorkerView) -> Range | None:
        """The range that is worth most for one that holds nothing; None if not one layer fits."""
        menu = self._menus[worker.peer_id]
        if not menu.windows:
            return None
        meeting = [*self._meeting(worker, menu)]
        cached = [each for each in worker.cached if self._fits(worker, each)]
        ranges = [*menu.windows, *meeting, *cached]
        others = {end - start for start, end in (*meeting, *cached)}
        worth = self._worth(worker, menu.most, ranges, menu.lengths | others)
        known = len(ranges) - len(cached)
        best = max(worth[:known])
        near = max(worth[known:], default=0.0)
        return ranges[worth.index(near, known) if near > best * CACHED_IS_WORTH else worth.index(best)]

    def _fits(self, worker: WorkerView, range_: Range) -> bool:
        return range_[1] <= self.n_layers and self._shape.stage_bytes(*range_) <= worker.vram

    def _worth(self, worker: WorkerView, most: int, ranges: Sequence[Range], lengths: Iterable[int]) -> list[float]:
        """What ranges, which have so many layers each, are worth to a worker."""
        rate = self.rate(worker.peer_id, most)
        rates = {layers: float(self.rate(worker.peer_id, layers)) for layers in lengths}
        prices = list(accumulate(self._prices, initial=0.0))
        power = self._power[worker.peer_id]
        met = self._pricing.meeting * power.away_s * power.speed * self._even * min(1.0, rate / self._usual)
        begin, stop = self._begin, self._end
        found = [
            rates[end - start] * (prices[end] - prices[start]) + met * (begin[start] + stop[end])
            for start, end in ranges
        ]
        if self._safe == self.n_layers:
            return found
        safer = self._safer(worker, rate * self._top * self.n_layers)
        return [each + safer[end] - safer[start] for each, (start, end) in zip(found, ranges, strict=True)]

    def _safer(self, worker: WorkerView, unit: float) -> list[float]:
        """How much it is worth to make the layers up to each border safer."""
        network = worker.network or worker.peer_id
        counts = (
            unit * (_SAFER[min(ways, _TOGETHER)] + (len(networks) < _TOGETHER and network not in networks))
            for ways, networks in zip(self.ways, self._networks, strict=True)
        )
        return list(accumulate(counts, initial=0.0))

    def _meeting(self, worker: WorkerView, menu: Menu) -> Iterator[Range]:
        """Somewhat shorter ranges than those, both ends of which meet others."""
        enough = self.rate(worker.peer_id, menu.most) // 4
        ends = [border for border, surplus in enumerate(self._surplus) if surplus < -enough]
        ends.append(self.n_layers)
        least = max(1, int(_SHORTEST * menu.most))
        for start in (0, *(border for border, surplus in enumerate(self._surplus) if surplus > enough)):
            for index in range(bisect_left(ends, start + least), bisect_left(ends, menu.ends.get(start, 0))):
                yield start, ends[index]
