"""Who should hold which layers. Pure: a snapshot goes in, assignments come out; for one snapshot always the same.

**The chain.** Layers 0..L are covered by a chain (see `chain`), and all other workers go where they are worth most (see
`replicas`). What is loaded stays where it is as long as its holes can be filled (see `filling`): where jobs run, along
the cuts of these, since one that has lost a stage needs workers for exactly that.

**How many stages.** Chains of the fewest are tried first, and then of some more, and other prices for what the rest may
hold, as long as there are not too many workers for that: the safest plan is taken, and of these the one with the most
tokens per second, hops counted (see `Power`). In swarms of `FEW` workers those plans, some without a chain and a safer
one where there is any (see `covering`), are only where a search begins (see `few`).

**Disks.** What idle workers have cached is loaded again where that gives nearly as much as the best plan and is as
safe. In larger swarms that is asked where nobody holds anything, as after a restart of all, and else stage by stage.

Complexity: what `chain` and `replicas` take, for each chain tried; of small swarms, what `few` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from azu.planning.chain import CACHED_IS_WORTH, cover
from azu.planning.coverage import holes
from azu.planning.covering import secure
from azu.planning.few import refine
from azu.planning.filling import find_chain
from azu.planning.levels import SPREAD, Pricing
from azu.planning.rating import Held, Rater, Score
from azu.planning.replicas import Plan, plan_around
from azu.planning.snapshot import Links, ModelShape, Placement, Power, Range, WorkerView, is_range, powers
from azu.planning.steps import Steps, finish

__all__ = ["FEW", "place", "place_in_steps"]

FEW = 24
# Chains with so many stages more than the fewest are tried, and no more plans than for so many workers in all.
_MORE_STAGES = 5
_MOST_TRIED = 600
# Best in most swarms of up to 40 workers was one of these, and of those that were tried besides none was much better.
_PRICINGS = Pricing(), Pricing(0.6, 0.1), Pricing(0.6, 0.4)
# In small swarms these are tried too, where nothing is planned around.
_MORE_PRICINGS = Pricing(1.0, 0.2), Pricing(0.0, 0.2), Pricing(0.3, 0.0), Pricing(0.1, 0.05)
_ROUNDS = 8  # of a small swarm, until nothing changes


def place(
    shape: ModelShape, workers: Sequence[WorkerView], links: Links | None = None, *, cuts: Sequence[Range] = ()
) -> tuple[Placement, ...]:
    """The assignments to give now; empty when there is nothing to change or nothing that would help.

    Args:
        cuts: the stages of running jobs, those that matter most first.
    """
    return finish(place_in_steps(shape, workers, links, cuts=cuts))


def place_in_steps(
    shape: ModelShape, workers: Sequence[WorkerView], links: Links | None = None, *, cuts: Sequence[Range] = ()
) -> Steps[tuple[Placement, ...]]:
    """As `place`, a little at a time."""
    workers = sorted(
        (worker for worker in workers if worker.held is None or is_range(worker.held, shape.n_layers)),
        key=lambda worker: worker.peer_id,
    )
    power = powers(workers, links or Links())
    then: Held
    if cuts and holes(shape.n_layers, [worker.held for worker in workers if worker.held]):
        # Jobs may wait for just these layers.
        taken = find_chain(shape, workers, power, cuts)
        then = {} if taken is None else (yield from plan_around(shape, workers, taken, power)).held
    elif len(workers) <= FEW:
        then = yield from _carry_out_few(shape, workers, power)
    else:
        then = yield from _place_many(shape, workers, power)
    changed = [
        Placement(worker.peer_id, *then[worker.peer_id])
        for worker in workers
        if worker.peer_id in then and then[worker.peer_id] != worker.held
    ]
    return tuple(sorted(changed, key=lambda placement: (placement.start, placement.end, placement.peer_id)))


def _place_many(shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]) -> Steps[Held]:
    """Who holds what then, in a large swarm."""
    best = yield from _best_plan(shape, workers, power)
    if best is None:
        return {}
    cached = {} if any(worker.held for worker in workers) else _on_disks(Rater(shape, workers, power), workers)
    if cached:
        as_they_were = [replace(worker, held=cached.get(worker.peer_id)) for worker in workers]
        loaded = yield from _best_plan(shape, as_they_were, power)
        if loaded is not None and _is_as_good(loaded.score, best.score):
            return cached | loaded.held
    return best.held


def _best_plan(shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]) -> Steps[Plan | None]:
    best: Plan | None = None
    for taken, pricing in _ways(shape, workers, power):
        plan = yield from plan_around(shape, workers, taken, power, pricing)
        if best is None or plan.score > best.score:
            best = plan
    return best


def _carry_out_few(shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]) -> Steps[Held]:
    """Who holds what in a small swarm, once planning again changes nothing."""
    then: Held = {}
    for _ in range(_ROUNDS):
        held = {worker.peer_id: worker.held for worker in workers if worker.held}
        then = yield from _place_few(shape, workers, power)
        if then == held:
            break
        workers = [
            worker
            if then.get(worker.peer_id) == worker.held
            else replace(worker, held=then.get(worker.peer_id), ready=True, jobs=0)
            for worker in workers
        ]
    return then


def _place_few(shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]) -> Steps[Held]:
    """Who holds what next."""
    had = {worker.peer_id: worker.held for worker in workers if worker.held}
    found: list[Plan] = []
    for taken, pricing in _ways(shape, workers, power):
        plan = yield from plan_around(shape, workers, taken, power, pricing)
        found.append(plan)
    if not any(plan.changes for plan in found):
        return had
    rater = Rater(shape, workers, power)
    idle = [worker.peer_id for worker in workers if worker.peer_id not in had]
    if safer := (yield from _secure(rater, had, idle, max(plan.score.safety for plan in found))):
        plan = yield from plan_around(shape, workers, safer, power)
        found.append(plan)
    plans: list[Held] = []
    for plan in sorted(found, key=lambda plan: plan.score, reverse=True):
        moved, stayed = had | plan.held, plan.held | had
        plans.append(moved if (yield from _pays(rater, moved, stayed)) else stayed)
    best = yield from refine(rater, idle, plans)
    if cached := _on_disks(rater, workers):
        loaded = yield from refine(rater, [peer_id for peer_id in idle if peer_id not in cached], [best | cached])
        is_as_good = _is_as_good((yield from rater.score(loaded)), (yield from rater.score(best)))
        return loaded if is_as_good else best
    return best


def _secure(rater: Rater, had: Held, idle: Sequence[str], safety: int) -> Steps[list[Placement]]:
    """What makes a small swarm safer than that; nothing if it was not found."""
    for wanted in range(SPREAD, max(safety, 1), -1):
        found = yield from secure(rater, had, idle, spread=wanted == SPREAD)
        if found is not None:
            return [Placement(peer_id, *range_) for peer_id, range_ in found.items()]
    return []


def _on_disks(rater: Rater, workers: Sequence[WorkerView]) -> dict[str, Range]:
    """The longest ranges that idle workers have cached and could load."""
    fitting = {
        worker.peer_id: [range_ for range_ in worker.cached if rater.fits(worker.peer_id, *range_)]
        for worker in workers
        if worker.held is None
    }
    return {
        peer_id: max(ranges, key=lambda range_: range_[1] - range_[0]) for peer_id, ranges in fitting.items() if ranges
    }


def _is_as_good(loaded: Score, best: Score) -> bool:
    """Whether loading what is cached is nearly as good as the best plan."""
    return loaded.safety >= best.safety and loaded.rate >= CACHED_IS_WORTH * best.rate


def _pays(rater: Rater, moved: Held, stayed: Held) -> Steps[bool]:
    """Whether moves make a small swarm better, and not slower; or cover the model."""
    if moved == stayed or not rater.safety(stayed):
        return True
    then, now = (yield from rater.score(moved)), (yield from rater.score(stayed))
    return then.beats(now) and then.rate >= now.rate


def _ways(
    shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power]
) -> Iterator[tuple[Sequence[Placement], Pricing]]:
    """Chains of more and more stages to plan around, the fewest first, and prices for the rest; one where layers are
    held; none if none fits. In small swarms, nothing to plan around too.
    """
    found = find_chain(shape, workers, power)
    if found is None:
        return
    if any(worker.held for worker in workers):
        yield found, _PRICINGS[0]
        return
    pricings = _PRICINGS[: max(1, _MOST_TRIED // len(workers))]
    yield from ((found, each) for each in pricings)
    more = min(_MORE_STAGES, _MOST_TRIED // (len(workers) * len(pricings)) - 1)
    for stages in range(len(found) + 1, len(found) + 1 + more):
        taken = cover(shape, workers, power, 0, shape.n_layers, stages)
        if taken is not None and len(taken) == stages:
            yield from ((taken, each) for each in pricings)
    if len(workers) <= FEW:
        yield from (((), each) for each in _PRICINGS + _MORE_PRICINGS)
