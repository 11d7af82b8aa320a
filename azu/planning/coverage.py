"""Which layers are covered, by which workers: what a job could be routed through at all."""

from __future__ import annotations

from collections.abc import Sequence

from azu.planning.snapshot import Range, WorkerView, is_range

__all__ = ["best_chain", "holes", "uncovered"]


def uncovered(n_layers: int, workers: Sequence[WorkerView]) -> tuple[Range, ...]:
    """The [start, end) stretches of layers that no ready worker can run.

    Where ranges overlap, one of the workers runs a part of its own.
    """
    return holes(n_layers, [worker.held for worker in workers if worker.ready and worker.held])


def holes(n_layers: int, ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The [start, end) stretches of layers 0..n_layers that no range covers; ranges outside of them do not count."""
    missing: list[Range] = []
    position = 0
    for start, end in sorted(range_ for range_ in ranges if is_range(range_, n_layers)):
        if start > position:
            missing.append((position, start))
        position = max(position, end)
    if position < n_layers:
        missing.append((position, n_layers))
    return tuple(missing)


def best_chain(n_layers: int, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Non-overlapping workers that cover the most layers, then with the fewest stages, then with the fewest jobs.

    Weighted interval scheduling over layer positions, O(W log W + L) for W workers and L layers.
    """
    by_end: dict[int, list[WorkerView]] = {}
    for worker in sorted(workers, key=lambda worker: worker.peer_id):
        if worker.held and is_range(worker.held, n_layers):
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
