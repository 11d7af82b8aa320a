"""Which workers run a job. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from azu.models.memory import MAX_JOBS
from coordinator.planning.coverage import best_chain, uncovered
from coordinator.planning.snapshot import Placement, WorkerView

__all__ = ["route"]


def route(n_layers: int, workers: Sequence[WorkerView], tokens: int) -> tuple[Placement, ...] | None:
    """A chain of ready workers that covers the model and has room for one more job of `tokens` positions each, or None.

    Of the chains it takes one with the fewest stages, and of replicas the one with the fewest jobs.
    """
    roomy = [w for w in workers if w.ready and w.kv_tokens_free >= tokens and w.jobs < MAX_JOBS]
    if uncovered(n_layers, roomy):
        return None
    chain = best_chain(n_layers, roomy)
    return tuple(Placement(worker.peer_id, *worker.held) for worker in chain if worker.held)
