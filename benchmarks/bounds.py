"""What a plan gives and what no plan can exceed, as linear programs that know nothing of how plans are made.

Workers run parts of what they hold, and jobs go from one to the next at any border (coordinator/planning/routing.py).
A part of n layers takes a worker n / speed + hop for each token, and a worker has one second in each second
(azu.planning.snapshot.Power). Hence, all in tokens per second:

    whole     the largest flow from the first layer to the last, where workers run all that they hold
    parts     the same where they run any parts of it, their time shared among those
    relaxed   the same where they hold anything that fits, their time shared among all of that: no plan gives more
    crude     as if all workers were always busy with as many layers as fit, whether these make up the model or not

Needs scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from azu.planning import Links, ModelShape, WorkerView
from azu.planning.snapshot import Power, powers

__all__ = ["best_with_parts", "crude", "parts", "relaxed", "safest", "safety_of", "whole"]

Edge = tuple[int, int, float]  # from a border between layers to another, tokens per second
_EXACT = 1e-3  # how far the relaxed bound may be above the least one, as a share of it


def _edges(workers: Sequence[WorkerView], n_layers: int) -> list[Edge]:
    """What each worker adds between the borders of what it holds."""
    power = powers(workers, Links())
    return [
        (*worker.held, power[worker.peer_id].rate(worker.held[1] - worker.held[0], n_layers))
        for worker in workers
        if worker.held
    ]


def _flow_rows(edges: Sequence[Edge], n_layers: int, columns: int) -> tuple[Any, Any]:
    """Out of each border but the ends what came into it (rows of a matrix), and what leaves border 0 (a cost)."""
    import numpy as np
    from scipy.sparse import coo_matrix

    numbers = range(len(edges))
    values = [-1.0] * len(edges) + [1.0] * len(edges)
    at = [start for start, *_ in edges] + [end for _, end, _ in edges]
    rows = coo_matrix((values, (at, [*numbers, *numbers])), shape=(n_layers + 1, columns))
    cost = np.zeros(columns)
    for column, (start, *_) in enumerate(edges):
        cost[column] = -(start == 0)
    return rows.tocsr()[1:n_layers], cost


def whole(workers: Sequence[WorkerView], n_layers: int) -> float:
    """Where workers run all that they hold."""
    import numpy as np
    from scipy.optimize import linprog

    edges = _edges(workers, n_layers)
    rows, cost = _flow_rows(edges, n_layers, len(edges))
    limits = [(0, rate) for *_, rate in edges]
    solved = linprog(cost, A_eq=rows, b_eq=np.zeros(n_layers - 1), bounds=limits, method="highs")
    assert solved.status == 0, solved.message
    return -float(solved.fun)


def parts(workers: Sequence[WorkerView], n_layers: int) -> float:
    """Where workers run parts of what they hold."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    power = powers(workers, Links())
    edges: list[Edge] = []
    owners: list[int] = []
    for index, worker in enumerate(workers):
        first, last = worker.held or (0, 0)
        for start in range(first, last):
            for end in range(start + 1, last + 1):
                edges.append((start, end, power[worker.peer_id].rate(end - start, n_layers)))
                owners.append(index)
    rows, cost = _flow_rows(edges, n_layers, len(edges))
    busy = coo_matrix(([1 / rate for *_, rate in edges], (owners, range(len(edges)))), (len(workers), len(edges)))
    solved = linprog(
        cost, A_ub=busy.tocsr(), b_ub=np.ones(len(workers)), A_eq=rows, b_eq=np.zeros(n_layers - 1), method="highs"
    )
    assert solved.status == 0, solved.message
    return -float(solved.fun)


def _ends(shape: ModelShape, vram: int) -> list[int]:
    """From each border, the end of the longest range that fits."""
    ends, end = [], 0
    for start in range(shape.n_layers):
        end = max(end, start)
        while end < shape.n_layers and shape.stage_bytes(start, end + 1) <= vram:
            end += 1
        ends.append(end)
    return ends


def crude(shape: ModelShape, workers: Sequence[WorkerView]) -> float:
    """As if every worker were always busy with the range that makes the most of it."""
    power = powers(workers, Links())
    total = 0.0
    for worker in workers:
        sizes = {end - start for start, end in enumerate(_ends(shape, worker.vram)) if end > start}
        total += max((size * power[worker.peer_id].rate(size, shape.n_layers) for size in sizes), default=0.0)
    return total / shape.n_layers


class _Prices:
    """The dual of `relaxed`, rows as they are needed: a price for each layer, all of them together 1, at which what the
    workers could earn, each with its best range, is as little as it can be.
    """

    def __init__(self, shape: ModelShape, workers: Sequence[WorkerView]) -> None:
        import numpy as np

        self._n_layers = n_layers = shape.n_layers
        self._workers = len(workers)
        power = powers(workers, Links())
        alike: dict[int, Any] = {}  # by memory, the starts and the ends of all that fits
        for vram in {worker.vram for worker in workers}:
            pairs = [(a, b) for a, last in enumerate(_ends(shape, vram)) for b in range(a + 1, last + 1)]
            alike[vram] = np.array(pairs, dtype=int).reshape(-1, 2).T
        self._ranges = [alike[worker.vram] for worker in workers]
        self._rates = [_rates(power[worker.peer_id], n_layers) for worker in workers]
        self._rows: set[tuple[int, int, int]] = set()  # worker, start, end

    def least(self) -> float:
        """Tokens per second that no plan exceeds."""
        import numpy as np

        prices = np.linspace(0.0, 1.0, self._n_layers + 1)  # of all layers up to each border
        best = np.inf
        while True:
            earned, better = self._best_answers(prices)
            best = min(best, earned)  # whatever the prices, no plan gives more
            known = len(self._rows)
            self._rows |= better
            if len(self._rows) == known:
                return best
            prices, least = self._solve()
            if best <= least * (1 + _EXACT):
                return best

    def _best_answers(self, prices: Any) -> tuple[float, set[tuple[int, int, int]]]:
        """What the workers earn at most at these prices, and some ranges that earn the most."""
        import numpy as np

        total, rows = 0.0, set()
        for index, ((starts, ends), rates) in enumerate(zip(self._ranges, self._rates, strict=True)):
            if len(starts):
                earned = rates[ends - starts] * (prices[ends] - prices[starts])
                total += max(float(earned.max()), 0.0)
                rows |= {(index, int(starts[k]), int(ends[k])) for k in np.argsort(earned)[-3:]}
        return total, rows

    def _solve(self) -> tuple[Any, float]:
        """The best prices as far as these rows say."""
        import numpy as np
        from scipy.optimize import linprog
        from scipy.sparse import coo_matrix

        rows, inner = sorted(self._rows), self._n_layers - 1
        entries: list[tuple[float, int, int]] = []
        limits = np.zeros(len(rows))
        for number, (worker, start, end) in enumerate(rows):
            rate = float(self._rates[worker][end - start])
            entries.append((-1.0, number, inner + worker))
            if start:
                entries.append((-rate, number, start - 1))
            if end <= inner:
                entries.append((rate, number, end - 1))
            else:
                limits[number] = -rate
        values, at, columns = zip(*entries, strict=True)
        matrix = coo_matrix((values, (at, columns)), (len(rows), inner + self._workers)).tocsr()
        cost = np.concatenate([np.zeros(inner), np.ones(self._workers)])
        solved = linprog(cost, A_ub=matrix, b_ub=limits, bounds=(0, None), method="highs")
        assert solved.status == 0, solved.message
        return np.concatenate([[0.0], solved.x[:inner], [1.0]]), float(solved.fun)


def _rates(power: Power, n_layers: int) -> Any:
    """Tokens per second by how many layers; nothing through none."""
    import numpy as np

    return np.array([0.0, *(power.rate(layers, n_layers) for layers in range(1, n_layers + 1))])


def relaxed(shape: ModelShape, workers: Sequence[WorkerView]) -> float:
    """Where workers hold anything that fits and share their time among all of it."""
    return _Prices(shape, workers).least()


def best_with_parts(
    shape: ModelShape, workers: Sequence[WorkerView], limit_s: float, safety: int = 1
) -> tuple[float, float]:
    """Of all plans that are as safe, the best that was found in time, and what none exceeds.

    Holding more is never worse, so each worker has one of the ranges to which no layer can be added.

    Args:
        safety: each layer is held by one worker, by 2, or (3) by workers of two networks.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix, csr_matrix, hstack

    n_layers, power = shape.n_layers, powers(workers, Links())
    edges: list[Edge] = []
    owners: list[int] = []
    for index, worker in enumerate(workers):
        for start, last in enumerate(_ends(shape, worker.vram)):
            for end in range(start + 1, last + 1):
                edges.append((start, end, power[worker.peer_id].rate(end - start, n_layers)))
                owners.append(index)
    held = _widest(shape, workers)
    count, columns = len(edges), len(edges) + len(held)
    rows, cost = _flow_rows(edges, n_layers, count)
    # A worker's time for all parts with a layer is 1 at most, and nothing where it does not hold the layer.
    busy = [
        (1 / rate, owner * n_layers + layer, column)
        for column, ((start, end, rate), owner) in enumerate(zip(edges, owners, strict=True))
        for layer in range(start, end)
    ]
    busy += [
        (-1.0, owner * n_layers + layer, count + column)
        for column, (owner, start, end) in enumerate(held)
        for layer in range(start, end)
    ]
    values, at, of = zip(*busy, strict=True)
    times = [1 / rate for *_, rate in edges]
    size = len(workers), columns
    idle = csr_matrix((n_layers - 1, len(held)))
    solved = milp(
        np.concatenate([cost, np.zeros(len(held))]),
        integrality=np.concatenate([np.zeros(count), np.ones(len(held))]),
        bounds=Bounds(0, np.concatenate([np.full(count, np.inf), np.ones(len(held))])),
        constraints=[
            LinearConstraint(hstack([rows, idle]), 0, 0),
            LinearConstraint(coo_matrix((values, (at, of)), (len(workers) * n_layers, columns)).tocsr(), -np.inf, 0),
            LinearConstraint(coo_matrix((times, (owners, range(count))), size).tocsr(), -np.inf, 1),
            *(
                LinearConstraint(hstack([csr_matrix((matrix.shape[0], count)), matrix]), least, most)
                for matrix, least, most in _choices(workers, held, n_layers, safety)
            ),
        ],
        options={"time_limit": limit_s, "mip_rel_gap": 0.005},
    )
    return (-float(solved.fun) if solved.fun is not None else 0.0), -float(solved.mip_dual_bound)


def safest(shape: ModelShape, workers: Sequence[WorkerView]) -> int:
    """How safe a plan can be: 0 where not all layers can be held, else as `best_with_parts` counts it."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    held = _widest(shape, workers)
    for safety in (3, 2, 1):
        solved = milp(
            np.zeros(len(held)),
            integrality=np.ones(len(held)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(*each) for each in _choices(workers, held, shape.n_layers, safety)],
        )
        if solved.status == 0:
            return safety
    return 0


def safety_of(workers: Sequence[WorkerView], n_layers: int) -> int:
    """How safe the least safe layer is."""
    found = 3
    for layer in range(n_layers):
        there = [worker for worker in workers if worker.held and worker.held[0] <= layer < worker.held[1]]
        networks = {worker.network or worker.peer_id for worker in there}
        found = min(found, len(there) if len(there) < 2 else 1 + min(len(networks), 2))
    return found


def _widest(shape: ModelShape, workers: Sequence[WorkerView]) -> list[tuple[int, int, int]]:
    """Each worker, by number, with each range to which no layer can be added."""
    found = []
    for index, worker in enumerate(workers):
        ends = _ends(shape, worker.vram)
        found += [(index, a, end) for a, end in enumerate(ends) if end > max([a, *ends[:a]])]
    return found


def _choices(
    workers: Sequence[WorkerView], held: Sequence[tuple[int, int, int]], n_layers: int, safety: int
) -> list[tuple[Any, float, float]]:
    """Rows, and their limits: each worker holds one range at most, and each layer is as safe."""
    import numpy as np
    from scipy.sparse import coo_matrix

    networks = [worker.network or worker.peer_id for worker in workers]
    together = [name for name in sorted(set(networks)) if networks.count(name) > 1] if safety > 2 else []

    def layers(left_out: str | None) -> Any:
        at = [
            (layer, column)
            for column, (owner, start, end) in enumerate(held)
            if networks[owner] != left_out
            for layer in range(start, end)
        ]
        rows, columns = zip(*at, strict=True) if at else ((), ())
        return coo_matrix((np.ones(len(at)), (rows, columns)), (n_layers, len(held))).tocsr()

    owners = [owner for owner, *_ in held]
    each = coo_matrix((np.ones(len(held)), (owners, range(len(held)))), (len(workers), len(held))).tocsr()
    return [
        (each, -np.inf, 1),
        (layers(None), min(safety, 2), np.inf),
        *((layers(name), 1, np.inf) for name in together),
    ]
