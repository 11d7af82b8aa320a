"""What workers say of their pace, for jobs that may have to leave a slow one; one for all jobs of a coordinator.

A worker that is slow is slow for all its jobs. They do not leave it at once, to meet again at the next best one: a
worker has a part in one move, and then in none until its record can tell what came of it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from azu.planning import DIRECT
from azu.records import WorkerRecord
from azu.tickets import JobTicket, StageEntry
from coordinator.hedging import Offer, Slow, is_worth_it

__all__ = ["Relief"]

# A worker's pace follows within ten passes, and its record is a second old at most.
_REST_S = 5.0


class Relief:
    """Answers out of workers' newest records.

    Args:
        record: a worker's, by peer id, or None.
        jobs: how many of our own jobs run at a worker.
    """

    def __init__(self, record: Callable[[str], WorkerRecord | None], jobs: Callable[[str], int]) -> None:
        self._record = record
        self._jobs = jobs
        self._rests: dict[str, float] = {}  # until when

    def steps(self, ticket: JobTicket) -> dict[str, float]:
        """Seconds that a token takes in each stage's pass, with the jobs that are there; where that was measured."""
        found = {stage.peer_id: self._step_s(stage, stage.peer_id) for stage in ticket.stages}
        return {peer_id: step_s for peer_id, step_s in found.items() if step_s}

    def accepts(self, ticket: JobTicket, slow: Slow, done: int, row_bytes: int, peer_id: str) -> bool:
        """Whether a job that has so many tokens is to leave a slow worker for this one.

        Args:
            row_bytes: of a position's hidden states.
        """
        record, stage = self._record(peer_id), ticket.stages[ticket.stage_of(slow.peer_id) or 0]
        step_s = self._step_s(stage, peer_id, more=1)
        if record is None or not step_s or self._is_resting(slow.peer_id) or self._is_resting(peer_id):
            return False
        prefill_s = (stage.end - stage.start) * record.speed.prefill_ns / 1e9 or step_s
        replay_s = ticket.positions(done) * (prefill_s + row_bytes / DIRECT.bandwidth)
        return is_worth_it(slow, Offer(step_s, replay_s), done=done, left=ticket.max_tokens - done)

    def moved(self, *peer_ids: str) -> None:
        """These had a part in a move just now."""
        now = trio.current_time()
        self._rests = {peer_id: until for peer_id, until in self._rests.items() if until > now}
        self._rests.update(dict.fromkeys(peer_ids, now + _REST_S))

    def _is_resting(self, peer_id: str) -> bool:
        return trio.current_time() < self._rests.get(peer_id, 0.0)

    def _step_s(self, stage: StageEntry, peer_id: str, *, more: int = 0) -> float:
        record = self._record(peer_id)
        if record is None:
            return 0.0
        jobs = max(record.jobs, self._jobs(peer_id)) + more
        speed = record.speed
        return (stage.end - stage.start) * (speed.decode_base_ns + max(jobs, 1) * speed.decode_token_ns) / 1e9
