"""What is loaded and stays where it is, and who fills the holes between.

Holes are filled one by one, the largest first: by idle workers; where these do not suffice, also by those that run no
job and only repeat what another one holds; and where they do not either, all is planned anew around the workers that
run jobs, which would refuse to change, and those of other coordinators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from azu.planning.chain import cover
from azu.planning.coverage import holes
from azu.planning.snapshot import ModelShape, Placement, Power, Range, WorkerView

__all__ = ["find_chain"]


def find_chain(
    shape: ModelShape, workers: Sequence[WorkerView], power: Mapping[str, Power], cuts: Sequence[Range] = ()
) -> list[Placement] | None:
    """What has to be loaded so that all layers are held, or None where the model cannot be covered.

    Args:
        cuts: the stages of running jobs, those that matter most first.
    """
    held = {worker.peer_id: worker.held for worker in workers}
    idle = [worker for worker in workers if worker.held is None]
    busy = [worker for worker in workers if worker.held and (worker.jobs or worker.is_fixed)]
    jobless = [worker for worker in workers if not (worker.held and worker.jobs) and not worker.is_fixed]
    for staying, able in (workers, idle), (workers, None), (busy, jobless):
        missing = holes(shape.n_layers, [worker.held for worker in staying if worker.held])
        for gaps in list(_along(missing, cuts)), missing:
            taken = _fill(shape, gaps, [*idle, *_spares(workers)] if able is None else able, power)
            if taken is not None:
                return [p for p in taken if held[p.peer_id] != (p.start, p.end)]
    return None


def _along(gaps: Iterable[Range], cuts: Sequence[Range]) -> Iterator[Range]:
    """The gaps in pieces, of which those that are a job's stage are whole; where two overlap, the first one is."""
    for start, end in gaps:
        whole: list[Range] = []
        for cut in cuts:
            if start <= cut[0] and cut[1] <= end and all(cut[1] <= a or b <= cut[0] for a, b in whole):
                whole.append(cut)
        for cut in sorted(whole):
            if start < cut[0]:
                yield start, cut[0]
            yield cut
            start = cut[1]
        if start < end:
            yield start, end


def _spares(workers: Sequence[WorkerView]) -> Iterator[WorkerView]:
    """Those that run no job and hold only what others hold too, who stay; the smallest first."""
    holders = Counter(layer for worker in workers if worker.held for layer in range(*worker.held))
    free = [w for w in workers if w.held and w.ready and not (w.jobs or w.is_fixed)]
    for worker in sorted(free, key=lambda w: w.held[1] - w.held[0] if w.held else 0):
        layers = Counter(range(*worker.held or (0, 0)))
        if all(holders[layer] > 1 for layer in layers):
            holders -= layers
            yield worker


def _fill(
    shape: ModelShape, gaps: Iterable[Range], able: Sequence[WorkerView], power: Mapping[str, Power]
) -> list[Placement] | None:
    """Who takes which layers so that no gap is left; None where these workers do not suffice."""
    taken: list[Placement] = []
    for start, end in sorted(gaps, key=lambda range_: range_[0] - range_[1]):
        used = {placement.peer_id for placement in taken}
        filled = cover(shape, [worker for worker in able if worker.peer_id not in used], power, start, end)
        if filled is None:
            return None
        taken += filled
    return taken
