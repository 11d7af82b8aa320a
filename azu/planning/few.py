"""Small swarms: which layers to give to free workers, so that the model outlives a worker and gives the most tokens.

What workers choose one by one (see `levels`) comes out even where there are many of them. With a few, other ranges are
often better, so here they are tried (see `rating` for what counts). To hold more is no loss, as jobs take parts of it:
so those are tried to which no layer can be added.

From the best plan to begin with, one worker after the other is taken out and put where the plan becomes the best, until
that makes it no better; then two and three at a time, and in the end all. Places are looked at in the order of what the
worker would earn there, and not where a bound says that the plan becomes no better: what flows without those workers
and the most that each of them would earn beside it, or what flows now and the most that each would earn beyond what it
does. Where several workers are out, few places of each are looked at, but all where there are not many plans: that
leaves the best plan there is. Where work is left then, the search begins again from the other plans.

Bounded: `MOST_WORK` in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import inf, prod

from azu.planning.levels import SPREAD
from azu.planning.parts import Parts
from azu.planning.rating import Held, Rater, Score
from azu.planning.snapshot import Range
from azu.planning.steps import Steps

__all__ = ["MOST_PLANS", "MOST_WORK", "refine"]

# Chains that are looked for, times workers: a chain takes 4 to 6 microseconds for each. With twice as many, plans of 12
# and 16 workers were better by 0.2%.
MOST_WORK = 60_000
_BEGINNING = 0.5  # so much of that is spent on plans to begin with at most
_A_LOOK = 20  # of that, for each worker whose earnings are looked at
# How many workers are taken out at a time, and how many places of each are looked at.
_EVERY = 1_000_000
_TOGETHER = (1, _EVERY), (2, 4), (3, 2)
MOST_PLANS = 10_000  # that are all looked at

_Earnings = Mapping[str, Mapping[Range, float]]


def refine(rater: Rater, free: Iterable[str], plans: Sequence[Held]) -> Steps[dict[str, Range]]:
    """The best plan that is found from these, in which only who is free may hold other layers."""
    able = rater.able(free)
    budget = _Budget(MOST_WORK)
    search = _Search(rater, budget)
    yield from search.begin_with(plans[0])
    if able:
        wide = {tuple(sorted(each.items())): each for each in (rater.widened(plan, able) for plan in plans)}
        for plan in wide.values():
            yield from search.begin_with(plan)
        others = [plan for plan in wide.values() if plan != search.best]
        yield from search.run(able)
        while others and budget.left > 0 and not search.is_over:
            other = _Search(rater, budget)
            yield from other.begin_with(others.pop(0))
            yield from other.run(able)
            search = other if other.score.beats(search.score) else search
    return search.best


class _Budget:
    """How much a search may still do."""

    def __init__(self, left: int) -> None:
        self.left = left


class _Search:
    """`best` is the best plan that was found, with its `score`; it `is_over` where there is no better one."""

    def __init__(self, rater: Rater, budget: _Budget) -> None:
        self._rater = rater
        self._budget = budget
        self.best: dict[str, Range] = {}
        self.score = Score(-1, 0.0)
        self.is_over = False
        self._parts = rater.parts({})
        self._gains: _Earnings = {}  # of those who are free, beside the best plan

    def begin_with(self, plan: Held) -> Steps[None]:
        """Take this plan, if it is better."""
        safety = self._rater.safety(plan)
        goal = self.score.goal(safety)
        if self.best and (goal == inf or self._budget.left < MOST_WORK * (1 - _BEGINNING)):
            return
        parts = self._rater.parts(plan)
        flow = yield from self._flow(parts, goal)
        if flow > goal or not self.best:
            self.best, self.score, self._parts = dict(plan), Score(safety, flow), parts

    def run(self, free: Sequence[str]) -> Steps[None]:
        """Give those who are free other layers, as long as that makes the plan better."""
        self._gains = yield from self._earnings(self._parts, free, self.best)
        for size, width in _TOGETHER:
            yield from self._by(size, width, free)
        if prod(len(self._rater.windows[peer_id]) for peer_id in free) <= MOST_PLANS:
            yield from self._without(free, _EVERY)
            self.is_over = self._budget.left > 0

    def _by(self, size: int, width: int, free: Sequence[str]) -> Steps[None]:
        """Take so many workers out at a time, in a circle, until all have been out since the plan became better."""
        some = list(combinations(free, size))
        waiting, number = len(some), 0
        while waiting and self._budget.left > 0:
            before = self.score
            yield from self._without(some[number], width)
            waiting, number = waiting - 1, (number + 1) % len(some)
            if self.score is not before:
                waiting = len(some)
                if size > 1:
                    yield from self._by(1, _EVERY, free)

    def _without(self, some: Sequence[str], width: int) -> Steps[None]:
        """Take these workers out, and put them where that makes the plan the best."""
        parts = self._parts.copy()
        for peer_id in some:
            parts.give(self._rater.number(peer_id), None)
        held = {peer_id: range_ for peer_id, range_ in self.best.items() if peer_id not in some}
        yield from self._put(held, parts, self.score.rate, {p: self._gains[p] for p in some}, width)

    def _put(self, held: Held, parts: Parts, most: float, gains: _Earnings, width: int) -> Steps[None]:
        """Look for the best ranges for some workers beside the others. At most flow `most` and what these gain."""
        flow = yield from self._flow(parts)
        earned = yield from self._earnings(parts, gains)
        best = {peer_id: max(each.values()) for peer_id, each in earned.items()}
        worker = max(gains, key=best.__getitem__)
        others = {peer_id: each for peer_id, each in gains.items() if peer_id != worker}
        flow += sum(best[peer_id] for peer_id in others)
        most_left = most + sum(max(each.values()) for each in others.values())
        looks = 0
        for range_ in sorted(earned[worker], key=lambda range_: (-earned[worker][range_], range_)):
            bound = min(flow + earned[worker][range_], most_left + gains[worker][range_])
            if bound <= self.score.goal(SPREAD):
                continue
            then = {**held, worker: range_}
            goal = self.score.goal(self._rater.safest(then, others))
            if bound <= goal:
                continue
            if looks >= width or self._budget.left <= 0:
                break
            looks += 1
            trial = parts.copy()
            trial.give(self._rater.number(worker), range_)
            if others:
                yield from self._put(then, trial, most + gains[worker][range_], others, width)
            else:
                yield from self._try(then, trial, goal)

    def _try(self, plan: dict[str, Range], parts: Parts, goal: float) -> Steps[None]:
        """Take this plan, if more flows than the goal."""
        flow = yield from self._flow(parts, goal)
        if flow > goal:
            self.best, self.score, self._parts = plan, Score(self._rater.safety(plan), flow), parts
            self._gains = yield from self._earnings(parts, self._gains, plan)

    def _flow(self, parts: Parts, above: float = 0.0) -> Steps[float]:
        before = parts.chains
        flow = yield from parts.flow(above)
        self._budget.left -= (parts.chains - before) * len(parts.held)
        return flow

    def _earnings(self, parts: Parts, some: Iterable[str], held: Held | None = None) -> Steps[_Earnings]:
        """What some would earn with each range that fits, beyond what they earn with those that they hold."""
        tolls = parts.tolls()
        earned = {}
        for peer_id in some:
            yield
            self._budget.left -= _A_LOOK
            number, ranges = self._rater.number(peer_id), self._rater.windows[peer_id]
            now = max(parts.earnings(number, tolls, [held[peer_id]])) if held and peer_id in held else 0.0
            each = parts.earnings(number, tolls, ranges)
            earned[peer_id] = {range_: more - now for range_, more in zip(ranges, each, strict=True)}
        return earned
