"""Who takes over layers that a running job has lost: several workers in a row, where none has a stage's all. Pure.

A stage that stays keeps its layers, whatever becomes of others. So lost stages are cut anew, and those that lie side by
side as one, as long as the same is paid for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from azu.planning.snapshot import Demand, Links, Placement, WorkerView
from azu.tickets import StageEntry
from coordinator.planning.routing import find_route

__all__ = ["cut_anew"]


def cut_anew(
    stages: Sequence[StageEntry],
    lost: Collection[int],
    workers: Sequence[WorkerView],
    tokens: int,
    *,
    without: Collection[str],
    links: Links,
    prompt: int,
) -> tuple[StageEntry, ...] | None:
    """A job's stages with other workers for the layers of those that are lost, or None.

    Args:
        lost: by index.
        tokens: positions for which each worker has to have room at once.
        without: who is not wanted.
        prompt: positions that they will have to compute.
    """
    used = {stage.peer_id for index, stage in enumerate(stages) if index not in lost} | set(without)
    found: list[StageEntry] = []
    for is_lost, stretch in _stretches(stages, lost):
        if not is_lost:
            found += stretch
            continue
        able = [worker for worker in workers if worker.peer_id not in used]
        chain = _chain(able, stretch[0].start, stretch[-1].end, tokens, links, prompt)
        if chain is None:
            return None
        used |= {each.peer_id for each in chain}
        paid_from = stretch[0].paid_from
        found += [StageEntry(peer_id=p.peer_id, start=p.start, end=p.end, paid_from=paid_from) for p in chain]
    return tuple(found)


def _stretches(stages: Sequence[StageEntry], lost: Collection[int]) -> Iterator[tuple[bool, list[StageEntry]]]:
    for (is_lost, _), group in groupby(enumerate(stages), lambda each: (each[0] in lost, each[1].paid_from)):
        yield is_lost, [stage for _, stage in group]


def _chain(
    workers: Sequence[WorkerView], start: int, end: int, tokens: int, links: Links, prompt: int
) -> list[Placement] | None:
    """The fastest way through layers [start, end) alone, of those with the fewest faults."""
    able = [
        replace(worker, held=(max(worker.held[0], start) - start, min(worker.held[1], end) - start))
        for worker in workers
        if worker.held and max(worker.held[0], start) < min(worker.held[1], end)
    ]
    for most in sorted({worker.faults for worker in able}):
        alike = [worker for worker in able if worker.faults <= most]
        route = find_route(end - start, alike, tokens, demand=Demand(prompt), links=links, parts=True)
        if route is not None:
            return [Placement(p.peer_id, p.start + start, p.end + start) for p in route.stages]
    return None
