"""How long a plan takes, and how far it is from the best there is.

    python -m benchmarks.planning
    python -m benchmarks.planning --sizes 60x32,200x80 --seeds 3

Times are CPU time of one core, the least of several runs: placement from nothing, placement again when a twentieth of
the workers were replaced or when nothing changed, and one job's route.

Distances are shares of a bound, by linear programs that know nothing of how the plan was made (benchmarks.bounds): what
a plan gives where jobs may take parts of what workers hold, as they do, and where they may not, each against the
relaxed bound; in swarms for which that takes long, against the crude one, which is a little higher. The same for swarms
whose workers were replaced, a twentieth at a time. For small swarms the planner's own search goes on for twenty times
as long, and where the plan is not near that bound, a mixed-integer program searches for a better plan that is as safe
and for a lower bound. With --through 6x32, which takes a quarter of an hour, the search goes through all plans that its
bounds leave open, so that the best one is known. Needs scipy: pip install scipy
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count as count_from
from itertools import islice
from math import inf
from typing import Any
from unittest.mock import patch

from azu.planning import Demand, Links, ModelShape, Placement, WorkerView, few, place
from benchmarks.bounds import best_with_parts, crude, parts, relaxed, safest, safety_of, whole
from benchmarks.machines import LAYERS, large_model, lines, machines
from coordinator.planning import find_route

RUNS = 7
SIZES = "12x32,16x32,24x32,40x32,60x32,100x80,200x80,200x126,400x126,1000x126"
CHURNED = "16x32,40x32,100x80"
CHURN_STEPS = 20
MOST_RELAXED = 16_000  # workers times layers
SMALL = "3x6,6x6,6x32,8x32,12x32,16x32,20x32"
SEARCH_S = 10.0
NEARLY = 0.95
LONGER = 20


def carried_out(workers: Sequence[WorkerView], plan: Sequence[Placement]) -> list[WorkerView]:
    """The workers with all layers loaded."""
    given = {placement.peer_id: (placement.start, placement.end) for placement in plan}
    held = [replace(worker, held=given.get(worker.peer_id, worker.held)) for worker in workers]
    return [replace(worker, ready=worker.held is not None) for worker in held]


def least(work: Callable[[], Any]) -> float:
    """CPU milliseconds, the least of so many runs."""
    times = []
    for _ in range(RUNS):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return 1_000 * min(times)


def report_times(count: int, seed: int) -> None:
    """A table for one swarm."""
    shape, workers = large_model(), machines(count, seed)
    running = carried_out(workers, place(shape, workers))
    newcomers = [replace(worker, peer_id=f"new{worker.peer_id}") for worker in machines(count, seed + 1)[::20]]
    churned = [worker for index, worker in enumerate(running) if index % 20] + newcomers
    assert place(shape, running) == (), "planning again changes something"
    known = lines(workers, seed)
    rows = {
        "place, nobody holds anything": lambda: place(shape, workers),
        "place, nobody holds anything, lines measured": lambda: place(shape, workers, Links(known.measured)),
        "place, a twentieth replaced": lambda: place(shape, churned),
        "place, nothing changed": lambda: place(shape, running),
        "route, whole ranges": lambda: find_route(LAYERS, running, 1_000),
        "route, parts of ranges": lambda: find_route(LAYERS, running, 1_000, parts=True),
        "route, parts of ranges, lines measured": lambda: find_route(
            LAYERS, running, 1_000, demand=Demand(500, 200), links=Links(known.measured), parts=True
        ),
    }
    print(f"{count} workers, {LAYERS} layers\n\n| | CPU ms |\n| --- | --- |")
    for name, work in rows.items():
        print(f"| {name} | {least(work):.0f} |")


def report_distances(sizes: Sequence[tuple[int, int]], seeds: int) -> None:
    """A table of shares of the bound."""
    print("\n| workers | layers | stages | parts, mean | least | whole ranges, mean | of which bound |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count, n_layers in sizes:
        shares, wholes, stages = [], [], []
        is_small = count * n_layers <= MOST_RELAXED
        for seed in range(seeds):
            shape, workers = large_model(n_layers), machines(count, seed)
            running = carried_out(workers, place(shape, workers))
            bound = relaxed(shape, workers) if is_small else crude(shape, workers)
            shares.append(parts(running, n_layers) / bound)
            wholes.append(whole(running, n_layers) / bound)
            route = find_route(n_layers, running, 1_000, parts=True)
            assert route is not None
            stages.append(len(route.stages))
        print(
            f"| {count} | {n_layers} | {statistics.mean(stages):.1f} | {statistics.mean(shares):.3f} "
            f"| {min(shares):.3f} | {statistics.mean(wholes):.3f} | {'relaxed' if is_small else 'crude'} |",
            flush=True,
        )


def report_churn(count: int, n_layers: int, seed: int) -> None:
    """A row: as workers are replaced, a twentieth at a time."""
    shape, running = large_model(n_layers), machines(count, seed)
    chance = random.Random(seed)
    newcomers = (replace(worker, peer_id=f"new{worker.peer_id}") for worker in machines(3 * count, seed + 1))
    shares, moved = [], 0
    for step in range(CHURN_STEPS + 1):
        plan = place(shape, running)
        given = {placement.peer_id for placement in plan}
        moved += sum(worker.held is not None and worker.peer_id in given for worker in running)
        running = carried_out(running, plan)
        if step % (CHURN_STEPS // 4) == 0:
            shares.append(parts(running, n_layers) / relaxed(shape, running))
        for index in chance.sample(range(count), max(1, count // 20)):
            running[index] = next(newcomers)
    print(f"| {count} | {n_layers} | {' | '.join(f'{share:.3f}' for share in shares)} | {moved} |", flush=True)


def report_reach(count: int, n_layers: int, swarms: int) -> None:
    """A row: small swarms that can hold the model at all, against the best that was found and what no plan exceeds.

    Others have to be as safe. Where the relaxed bound leaves more than a twentieth open, a mixed-integer program looks
    for a better plan too, and for a lower bound.
    """
    of_best, of_bound = [], []
    programs = unsafe = 0
    for shape, workers in small_swarms(count, n_layers, swarms):
        running = carried_out(workers, place(shape, workers))
        safety = safety_of(running, n_layers)
        rate, bound = parts(running, n_layers), relaxed(shape, workers)
        best = max(rate, parts(searched(shape, workers, work=LONGER * few.MOST_WORK), n_layers))
        if rate < NEARLY * bound:
            found, limit = best_with_parts(shape, workers, SEARCH_S, safety)
            best, bound = max(best, found), min(bound, limit)
            programs += 1
        of_best.append(rate / best)
        of_bound.append(rate / bound)
        unsafe += safety < safest(shape, workers)
    shares = (min(of_best), statistics.median(of_best), min(of_bound), statistics.median(of_bound))
    text = " | ".join(f"{share:.3f}" for share in shares)
    print(f"| {count} | {n_layers} | {text} | {programs} | {unsafe} |", flush=True)


def report_through(count: int, n_layers: int, swarms: int) -> None:
    """A row: small swarms against the best plan there is."""
    shares = []
    for shape, workers in small_swarms(count, n_layers, swarms):
        best = parts(searched(shape, workers, work=inf, plans=inf), n_layers)
        shares.append(parts(carried_out(workers, place(shape, workers)), n_layers) / best)
    print(f"| {count} | {n_layers} | {min(shares):.3f} | {statistics.median(shares):.3f} |", flush=True)


def small_swarms(count: int, n_layers: int, swarms: int) -> Iterator[tuple[ModelShape, list[WorkerView]]]:
    """So many that can hold the model at all."""
    shape = large_model(n_layers)
    found = ((shape, machines(count, seed)) for seed in count_from(0) if safest(shape, machines(count, seed)))
    return islice(found, swarms)


def searched(
    shape: ModelShape, workers: Sequence[WorkerView], *, work: float, plans: float = few.MOST_PLANS
) -> list[WorkerView]:
    """The workers with all layers loaded, of a plan that was searched for with other limits."""
    with patch.object(few, "MOST_WORK", work), patch.object(few, "MOST_PLANS", plans):
        return carried_out(workers, place(shape, workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1_000, help="in the swarm that is timed")
    parser.add_argument("--sizes", default=SIZES, help="workers x layers, measured by the bound")
    parser.add_argument("--churned", default=CHURNED, help="workers x layers, measured while workers are replaced")
    parser.add_argument("--small", default=SMALL, help="workers x layers, for which better plans are searched for")
    parser.add_argument("--through", default="", help="workers x layers, for which all plans are gone through")
    parser.add_argument("--swarms", type=int, default=10, help="of each of these sizes")
    parser.add_argument("--seeds", type=int, default=5, help="swarms of each size")
    options = parser.parse_args()
    report_times(options.workers, seed=0)
    try:
        import scipy.optimize  # noqa: F401 - only here, and only for the bounds
    except ImportError:
        sys.exit("\nNo distances: they need scipy. Run: pip install scipy")
    report_distances(_sizes(options.sizes), options.seeds)
    steps = [f"after {CHURN_STEPS * quarter // 4}" for quarter in range(1, 5)]
    print(f"\n| workers | layers | at first | {' | '.join(steps)} | moved |\n| --- | --- |{' --- |' * 6}")
    for count, n_layers in _sizes(options.churned):
        report_churn(count, n_layers, seed=0)
    print(
        "\n| workers | layers | of the best found, least | median | of the bound, least | median | MILPs | less safe |"
        "\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for count, n_layers in _sizes(options.small):
        report_reach(count, n_layers, options.swarms)
    if options.through:
        print("\n| workers | layers | of the best there is, least | median |\n| --- | --- | --- | --- |")
    for count, n_layers in _sizes(options.through):
        report_through(count, n_layers, options.swarms)


def _sizes(text: str) -> list[tuple[int, int]]:
    pairs = (each.split("x") for each in text.split(",") if each)
    return [(int(count), int(n_layers)) for count, n_layers in pairs]


if __name__ == "__main__":
    main()
