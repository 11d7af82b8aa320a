"""Small swarms: which layers to give to free workers, so that the model outlives a worker and gives the most tokens.

What workers choose one by one (see `levels`) comes out even where there are many of them. With a few, other ranges are
often better, so here any are tried. What counts is, in this order:

**Safety.** Every layer is held by somebody, by two workers, by workers of two networks.
**Tokens per second.** The largest flow through all ranges, where a stage costs its layers and a hop (see `Power`).

From each plan to begin with the search goes to the best neighbour (one worker holds another range, two change places,
a border moves), until none is better. From the best of them it goes on to the best plan in which only three workers
hold other ranges, whichever three, and at last to that in which all may: of twelve layers at most any range is tried,
of more those between borders that are there. Plans are left out of which a bound says that they are no better: what
workers could add if their layers could be cut at will, like water that is poured on what the others give. In small
enough swarms that leaves the best plan there is.

Bounded: `_MOST_LOOKS` plans are looked at for each step, `_MOST_NODES` in the whole search.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, islice
from typing import NamedTuple

from azu.planning.flow import largest_flow
from azu.planning.snapshot import ModelShape, Power, Range, WorkerView
from azu.planning.steps import Steps

__all__ = ["Held", "Rater", "Score", "refine"]

Held = Mapping[str, Range]  # by peer id; who holds nothing is not in it

_MOST_LOOKS = 2_000
_MOST_NODES = 20_000
_NODES_A_STEP = 32
_TOGETHER = 3
_ALL_LAYERS = 12  # of larger models not all ranges are tried
_NOTICEABLY = 1.001
_SPREAD = 3


class Score(NamedTuple):
    """How good a plan is: its safety from 0 (a layer is missing) to 3 (spread over networks), tokens per second."""

    safety: int
    rate: float

    def beats(self, other: Score) -> bool:
        """Whether it is better by more than nothing."""
        if self.safety != other.safety:
            return self.safety > other.safety
        return self.rate > other.rate * _NOTICEABLY


class Rater:
    """What plans for a model are worth, and who could hold what."""

    def __init__(self, shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]) -> None:
        self.n_layers = shape.n_layers
        self.power = power
        self._shape = shape
        self._networks = {worker.peer_id: worker.network or worker.peer_id for worker in workers}
        self._vram = {worker.peer_id: worker.vram for worker in workers}
        self.share = cache(self._share)

    def _share(self, peer_id: str, layers: int) -> float:
        return self.power[peer_id].rate(layers, self.n_layers)

    def fits(self, peer_id: str, start: int, end: int) -> bool:
        """Whether a worker could hold these layers; False where there are no such layers."""
        exists = 0 <= start < end <= self.n_layers
        return exists and self._shape.stage_bytes(start, end) <= self._vram[peer_id]

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
        return _SPREAD if spread == every else 2

    def rate(self, held: Held, above: float = 0.0) -> float:
        """Tokens per second; 0 where it is soon clear that it is no more than `above`."""
        shares = [(range_, self.share(peer_id, range_[1] - range_[0])) for peer_id, range_ in held.items()]
        changes = [0.0] * (self.n_layers + 1)
        for (start, end), share in shares:
            changes[start] += share
            changes[end] -= share
        across = 0.0
        for change in changes[:-1]:
            across += change
            if across <= above:
                return 0.0
        return largest_flow(self.n_layers, shares)

    def score(self, held: Held) -> Score:
        """See `Score`."""
        return Score(self.safety(held), self.rate(held))

    def improved(self, held: Held, best: Score) -> Score | None:
        """A plan's score, if it beats the best."""
        safety = self.safety(held)
        if safety < best.safety:
            return None
        score = Score(safety, self.rate(held, best.rate * _NOTICEABLY if safety == best.safety else 0.0))
        return score if score.beats(best) else None


def refine(rater: Rater, free: Sequence[str], plans: Sequence[Held]) -> Steps[dict[str, Range]]:
    """The best plan that is found from these, in which only who is free may hold other layers."""
    best: dict[str, Range] = {}
    score = Score(0, 0.0)
    for plan in plans:
        climbed, found = yield from _climb(rater, free, dict(plan), rater.score(plan))
        if not best or found.beats(score):
            best, score = climbed, found
    budget = _Budget(_MOST_NODES)
    is_better = True
    while is_better:
        is_better = False
        for some in combinations(free, _TOGETHER):
            search = _Search(rater, some, best, score, budget)
            yield from search.run()
            if search.score.beats(score):
                best, score, is_better = search.best, search.score, True
    search = _Search(rater, free, best, score, budget)
    yield from search.run()
    return search.best


def _climb(
    rater: Rater, free: Sequence[str], plan: dict[str, Range], score: Score
) -> Steps[tuple[dict[str, Range], Score]]:
    while True:
        best, score = yield from _best_of(rater, _neighbours(rater, free, plan), plan, score)
        if best is plan:
            return plan, score
        plan = best


def _best_of(
    rater: Rater, plans: Iterator[dict[str, Range]], best: dict[str, Range], score: Score
) -> Steps[tuple[dict[str, Range], Score]]:
    for plan in islice(plans, _MOST_LOOKS):
        yield
        if (found := rater.improved(plan, score)) is not None:
            best, score = plan, found
    return best, score


def _neighbours(rater: Rater, free: Sequence[str], held: Held) -> Iterator[dict[str, Range]]:
    for border in _borders(rater, held)[1:-1]:
        for other in (border - 1, border + 1):
            moved = {
                peer_id: (other if start == border else start, other if end == border else end)
                for peer_id, (start, end) in held.items()
                if peer_id in free and border in (start, end)
            }
            if all(rater.fits(peer_id, *range_) for peer_id, range_ in moved.items()):
                yield {**held, **moved}
    for peer_id in free:
        for start, end in combinations(_ends(rater, held), 2):
            if held.get(peer_id) != (start, end) and rater.fits(peer_id, start, end):
                yield {**held, peer_id: (start, end)}
    for one, two in combinations(free, 2):
        if one not in held or two not in held or held[one] == held[two]:
            continue
        if rater.fits(one, *held[two]) and rater.fits(two, *held[one]):
            yield {**held, one: held[two], two: held[one]}


def _borders(rater: Rater, held: Held) -> list[int]:
    return sorted({0, rater.n_layers, *(border for range_ in held.values() for border in range_)})


def _ends(rater: Rater, held: Held) -> Sequence[int]:
    """Where ranges may begin and end: of a large model at what are borders already."""
    return _borders(rater, held) if rater.n_layers > _ALL_LAYERS else range(rater.n_layers + 1)


class _Budget:
    """How many nodes searches may still look at."""

    def __init__(self, nodes: int) -> None:
        self.left = nodes


class _Search:
    """All plans in which some workers hold other layers; `best` is the best that `run` has found, with its `score`."""

    def __init__(
        self, rater: Rater, free: Sequence[str], plan: dict[str, Range], score: Score, budget: _Budget
    ) -> None:
        self._rater = rater
        self._budget = budget
        self.best, self.score = plan, score
        ends = _ends(rater, plan)
        menus = {
            peer_id: sorted(
                (e for e in combinations(ends, 2) if rater.fits(peer_id, *e)), key=lambda e: (e[0] - e[1], e)
            )
            for peer_id in free
        }
        worth = {
            peer_id: max(((end - start) * rater.share(peer_id, end - start) for start, end in menu), default=0.0)
            for peer_id, menu in menus.items()
        }
        # The strongest first; one that fits nowhere is not looked at.
        order = sorted((peer_id for peer_id in free if menus[peer_id]), key=lambda peer_id: (-worth[peer_id], peer_id))
        self._choices = [
            (peer_id, [(range_, rater.share(peer_id, range_[1] - range_[0])) for range_ in menus[peer_id]])
            for peer_id in order
        ]
        # What all from each one on could still add: tokens per second times layers, and layers.
        sizes = [menus[peer_id][0][1] - menus[peer_id][0][0] for peer_id in order]
        self._water = [sum(worth[peer_id] for peer_id in order[index:]) for index in range(len(order) + 1)]
        self._layers = [sum(sizes[index:]) for index in range(len(order) + 1)]
        fixed = {peer_id: range_ for peer_id, range_ in plan.items() if peer_id not in free}
        tokens, times = [0.0] * rater.n_layers, [0] * rater.n_layers
        for peer_id, (start, end) in fixed.items():
            for layer in range(start, end):
                tokens[layer] += rater.share(peer_id, end - start)
                times[layer] += 1
        self._root = fixed, tokens, times

    def run(self) -> Steps[None]:
        """Look at all of them."""
        yield from self._descend(0, *self._root)

    def _descend(self, index: int, held: dict[str, Range], tokens: list[float], times: list[int]) -> Steps[None]:
        """Look at all plans that give the workers from this one on some layers: holding them is never worse than none.

        `tokens` per second and how many `times` each layer is held so far.
        """
        self._budget.left -= 1
        if not self._budget.left % _NODES_A_STEP:
            yield
        if self._budget.left < 0 or not self._bound(index, tokens, times).beats(self.score):
            return
        if index == len(self._choices):
            if (found := self._rater.improved(held, self.score)) is not None:
                self.best, self.score = held, found
            return
        peer_id, menu = self._choices[index]
        for (start, end), share in menu:
            more, again = tokens.copy(), times.copy()
            for layer in range(start, end):
                more[layer] += share
                again[layer] += 1
            yield from self._descend(index + 1, {**held, peer_id: (start, end)}, more, again)

    def _bound(self, index: int, tokens: Sequence[float], times: Sequence[int]) -> Score:
        """No plan that goes on from here is better."""
        never = times.count(0)
        lacking = 2 * never + times.count(1)
        layers = self._layers[index]
        safety = 0 if never > layers else 1 if lacking > layers else _SPREAD
        return Score(safety, _filled_to(tokens, self._water[index]))


def _filled_to(grounds: Sequence[float], water: float) -> float:
    """How high water stands that is poured on grounds of these heights."""
    height = 0.0
    for count, ground in enumerate(sorted(grounds), 1):
        if count > 1 and (ground - height) * (count - 1) >= water:
            return height + water / (count - 1)
        water -= (ground - height) * (count - 1)
        height = ground
    return height + water / len(grounds)
