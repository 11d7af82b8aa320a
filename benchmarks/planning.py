"""How long a plan takes, and how far it is from the best there is.

    python -m benchmarks.planning
    python -m benchmarks.planning --sizes 60x32,200x80 --seeds 3

Times are CPU time of one core, the least of several runs: placement from nothing, placement again when a twentieth of
the workers were replaced or when nothing changed, and one job's route.

Distances are shares of a bound. What a plan gives is the largest flow of tokens through it, where a stage costs its
layers and a hop (azu.planning.snapshot.Power), solved as a linear program that knows nothing of how the plan
was made. The bound is that of the whole swarm with all its time well spent: each worker always busy with as many layers
as it can hold, of which no placement can have more. For small swarms the best placement itself is found too, as a
mixed-integer program: whatever it has more than the plan is the price of safety and of being quick. Needs scipy: pip
install scipy
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from azu.planning import Demand, Links, ModelShape, Placement, WorkerView, place
from azu.planning.snapshot import powers
from benchmarks.machines import LAYERS, large_model, lines, machines
from coordinator.planning import find_route

RUNS = 7
SIZES = "12x32,40x32,60x32,100x80,200x80,200x126,400x126,1000x126"
SMALL = "3x6,5x6,6x6"
MILP_S = 20.0
Edge = tuple[int, int, float]  # from a border between layers to another, tokens per second


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


def edges_of(workers: Sequence[WorkerView], n_layers: int) -> list[Edge]:
    """What each worker adds between the borders of what it holds."""
    power = powers(workers, Links())
    return [
        (*worker.held, power[worker.peer_id].rate(worker.held[1] - worker.held[0], n_layers))
        for worker in workers
        if worker.held
    ]


def bound_of(shape: ModelShape, workers: Sequence[WorkerView]) -> float:
    """Tokens per second if every worker were always busy with the range that makes the most of it."""
    power = powers(workers, Links())
    n_layers, total = shape.n_layers, 0.0
    for worker in workers:
        ranges = [(0, n_layers), *((1, 1 + count) for count in range(1, n_layers)), (0, 1), (n_layers - 1, n_layers)]
        sizes = [end - start for start, end in ranges if shape.stage_bytes(start, end) <= worker.vram]
        total += max((size * power[worker.peer_id].rate(size, n_layers) for size in sizes), default=0.0)
    return total / n_layers


def flow_rows(edges: Sequence[Edge], n_layers: int, columns: int) -> tuple[Any, Any]:
    """Out of each border but the ends what came into it (rows of a matrix), and what leaves border 0 (a cost)."""
    import numpy as np
    from scipy.sparse import lil_matrix

    rows = lil_matrix((n_layers + 1, columns))
    cost = np.zeros(columns)
    for column, (start, end, _) in enumerate(edges):
        rows[start, column] -= 1
        rows[end, column] += 1
        cost[column] = -(start == 0)
    return rows.tocsr()[1:n_layers], cost


def largest_flow(edges: Sequence[Edge], n_layers: int) -> float:
    """Tokens per second from layer 0 to the end, as a linear program."""
    import numpy as np
    from scipy.optimize import linprog

    rows, cost = flow_rows(edges, n_layers, len(edges))
    zeros = np.zeros(n_layers - 1)
    solved = linprog(cost, A_eq=rows, b_eq=zeros, bounds=[(0, rate) for *_, rate in edges], method="highs")
    assert solved.status == 0, solved.message
    return -float(solved.fun)


def best_placement(shape: ModelShape, workers: Sequence[WorkerView]) -> float | None:
    """Tokens per second of the best placement, one range for each worker, however many stages; None if not found."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, hstack, identity, lil_matrix

    power = powers(workers, Links())
    edges: list[Edge] = []
    owners: list[int] = []
    for index, worker in enumerate(workers):
        for start in range(shape.n_layers):
            for end in range(start + 1, shape.n_layers + 1):
                if shape.stage_bytes(start, end) <= worker.vram:
                    edges.append((start, end, power[worker.peer_id].rate(end - start, shape.n_layers)))
                    owners.append(index)
    count = len(edges)
    rows, cost = flow_rows(edges, shape.n_layers, count)
    one_each = lil_matrix((len(workers), count))
    for column, owner in enumerate(owners):
        one_each[owner, column] = 1
    rates = csr_matrix(np.diag([rate for *_, rate in edges]))
    # Columns: the flow through each worker's each range, then whether it holds that range.
    solved = milp(
        np.concatenate([cost, np.zeros(count)]),
        integrality=np.concatenate([np.zeros(count), np.ones(count)]),
        bounds=Bounds(0, np.concatenate([[rate for *_, rate in edges], np.ones(count)])),
        constraints=[
            LinearConstraint(hstack([rows, csr_matrix(rows.shape)]), 0, 0),
            LinearConstraint(hstack([identity(count), -rates]), -np.inf, 0),
            LinearConstraint(hstack([csr_matrix(one_each.shape), one_each.tocsr()]), 0, 1),
        ],
        options={"time_limit": MILP_S, "mip_rel_gap": 0.001},
    )
    return -float(solved.fun) if solved.status == 0 else None


def report_distances(sizes: Sequence[tuple[int, int]], seeds: int) -> None:
    """A table of shares of the bound."""
    print("\n| workers | layers | stages | of the bound, mean | least |\n| --- | --- | --- | --- | --- |")
    for count, n_layers in sizes:
        shares, stages = [], []
        for seed in range(seeds):
            shape, workers = large_model(n_layers), machines(count, seed)
            running = carried_out(workers, place(shape, workers))
            shares.append(largest_flow(edges_of(running, n_layers), n_layers) / bound_of(shape, workers))
            route = find_route(n_layers, running, 1_000)
            assert route is not None
            stages.append(len(route.stages))
        print(
            f"| {count} | {n_layers} | {statistics.mean(stages):.1f} | {statistics.mean(shares):.3f} "
            f"| {min(shares):.3f} |"
        )


def report_best(count: int, n_layers: int, seeds: int) -> None:
    """Rows for small swarms, for which the best placement can be found."""
    for seed in range(seeds):
        shape, workers = large_model(n_layers), machines(count, seed)
        running = carried_out(workers, place(shape, workers))
        best = best_placement(shape, workers)
        rate = largest_flow(edges_of(running, n_layers), n_layers)
        if best is None:
            print(f"| {count} | {n_layers} | {rate:.1f} | not found in {MILP_S:.0f} s | |")
        else:
            print(f"| {count} | {n_layers} | {rate:.1f} | {best:.1f} | {rate / best:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1_000, help="in the swarm that is timed")
    parser.add_argument("--sizes", default=SIZES, help="workers x layers, measured by the bound")
    parser.add_argument("--small", default=SMALL, help="workers x layers, measured by the best placement")
    parser.add_argument("--seeds", type=int, default=5, help="swarms of each size")
    options = parser.parse_args()
    report_times(options.workers, seed=0)
    try:
        import scipy.optimize  # noqa: F401 - only here, and only for the bounds
    except ImportError:
        sys.exit("\nNo distances: they need scipy. Run: pip install scipy")
    report_distances(_sizes(options.sizes), options.seeds)
    print("\n| workers | layers | the plan | the best placement | ratio |\n| --- | --- | --- | --- | --- |")
    for count, n_layers in _sizes(options.small):
        report_best(count, n_layers, options.seeds)


def _sizes(text: str) -> list[tuple[int, int]]:
    pairs = (each.split("x") for each in text.split(",") if each)
    return [(int(count), int(n_layers)) for count, n_layers in pairs]


if __name__ == "__main__":
    main()
