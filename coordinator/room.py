"""What this coordinator's own running jobs take at workers, which their records may not tell of yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from azu.planning import Placement, Range
from azu.records import WorkerRecord
from coordinator.admission import Grant

__all__ = ["Room"]


class Room:
    """Counts jobs and positions of KV cache, by worker.

    Args:
        workers: live workers' newest records.
    """

    def __init__(self, workers: Callable[[], Sequence[WorkerRecord]]) -> None:
        self._workers = workers
        self._running: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()  # positions that running jobs began with, by peer id
        self._granted: dict[str, tuple[int, int]] = {}  # those of them since the peer's record of this sequence number
        self._cuts: Counter[tuple[str, Range]] = Counter()  # running jobs' stages, by model

    def take(self, grant: Grant) -> None:
        """A job runs in this chain from now on."""
        self._count(grant, 1)

    def free(self, grant: Grant) -> None:
        """It runs there no more."""
        self._count(grant, -1)

    def change(self, grant: Grant, chain: Iterable[Placement]) -> None:
        """Count a job at the workers that have it now, and not at those that had it."""
        self.free(grant)
        grant.chain = tuple(chain)
        self.take(grant)

    def jobs(self, peer_id: str) -> int:
        """How many run at a worker."""
        return self._running[peer_id]

    def cuts(self, manifest: str) -> list[Range]:
        """The stages [start, end) into which running jobs cut a model, those of most jobs first."""
        found = [(jobs, end - start, (start, end)) for (digest, (start, end)), jobs in self._cuts.items()
                 if digest == manifest]  # fmt: skip
        return [range_ for *_, range_ in sorted(found, reverse=True)]

    def note(self, peer_ids: Collection[str], tokens: int) -> None:
        """Count positions that these workers' records do not tell of yet."""
        for worker in self._workers():
            if worker.peer_id in peer_ids:
                since = self._granted_since(worker.peer_id, worker.sequence)
                self._granted[worker.peer_id] = worker.sequence, since + tokens

    def able(self, tokens: int, *, when_empty: bool = False) -> list[WorkerRecord]:
        """The adjusted records of workers whose whole KV cache has so many positions."""
        able = (worker for worker in self._workers() if worker.kv_tokens >= tokens)
        return [self._adjusted(worker, when_empty=when_empty) for worker in able]

    def _count(self, grant: Grant, jobs: int) -> None:
        for cut in ((grant.manifest, (stage.start, stage.end)) for stage in grant.chain):
            self._cuts[cut] += jobs
            if not self._cuts[cut]:
                del self._cuts[cut]
        for peer_id in (stage.peer_id for stage in grant.chain):
            self._reserved[peer_id] += jobs * grant.tokens
            self._running[peer_id] += jobs
            if not self._running[peer_id]:
                del self._running[peer_id], self._reserved[peer_id]
                self._granted.pop(peer_id, None)

    def _granted_since(self, peer_id: str, sequence: int) -> int:
        """Positions of KV cache that the worker's record of this sequence number does not tell of yet."""
        known, tokens = self._granted.get(peer_id, (sequence, 0))
        return tokens if known == sequence else 0

    def _adjusted(self, worker: WorkerRecord, *, when_empty: bool) -> WorkerRecord:
        """A record with our own running jobs counted in, which may be newer than the record."""
        told = worker.kv_tokens_free - self._granted_since(worker.peer_id, worker.sequence)
        free = min(worker.kv_tokens - self._reserved[worker.peer_id], told)
        jobs = max(worker.jobs, self._running[worker.peer_id])
        free = worker.kv_tokens if when_empty else max(free, 0)
        return worker.model_copy(update={"kv_tokens_free": free, "jobs": jobs})
