"""What workers say of their pace, for jobs that may have to leave a slow one; one for all jobs of a coordinator.

A worker that is slow is slow for all its jobs. They do not leave it at once, to meet again at the next best one: a
worker has a part in one move, and then in none until its record can tell what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from azu.models.manifest import Manifest
from azu.planning import DIRECT, WorkerView, links_of, views_for
from azu.records import WorkerRecord
from azu.tickets import JobTicket, StageEntry
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE
from coordinator.hedging import Offer, Part, Reading, Slow, is_worth_it
from coordinator.usual import Usual

__all__ = ["Relief"]

# A worker's pace follows within ten passes, and its record is a second old at most.
_REST_S = 5.0


class Relief:
    """Answers out of workers' newest records.

    Args:
        record: a worker's, by peer id, or None. usual: what is usual with it, or None.
        jobs: how many of our own jobs run at a worker.
    """

    def __init__(
        self,
        record: Callable[[str], WorkerRecord | None],
        usual: Callable[[str], Usual | None],
        jobs: Callable[[str], int],
    ) -> None:
        self._record = record
        self._usual = usual
        self._jobs = jobs
        self._rests: dict[str, float] = {}  # until when

    def parts(self, ticket: JobTicket) -> dict[Part, Reading]:
        """What a step costs in each stage, with the jobs that are there; as far as it was measured."""
        found: dict[Part, Reading] = {}
        for index, stage in enumerate(ticket.stages):
            if step_s := self._step_s(stage, stage.peer_id):
                found[Part(stage.peer_id, "pass")] = Reading(step_s, self._usual_step_s(stage))
            if (usual := self._usual(stage.peer_id)) is not None and usual.answer_s:
                # A question and its answer take two messages there, a token takes one.
                found[Part(stage.peer_id, "answer")] = Reading(usual.answer_s / 2, usual.usual_answer_s / 2)
            for neighbour, line_s in self._lines(ticket, index).items():
                found[Part(stage.peer_id, "line", neighbour)] = Reading(line_s)
        return found

    def accepts(
        self, manifest: Manifest, ticket: JobTicket, slow: Slow, done: int, stages: Sequence[StageEntry]
    ) -> bool:
        """Whether a job that has so many tokens is to leave a slow worker for this one, or several in a row."""
        offers = [self._offer(manifest, ticket, slow, done, stage) for stage in stages]
        found = [offer for offer in offers if offer is not None]
        if len(found) < len(offers) or self._is_resting(slow.peer_id):
            return False
        # Lines between them count twice, which is on the safe side.
        offer = Offer(sum(each.step_s for each in found), sum(each.replay_s for each in found))
        return is_worth_it(slow, offer, done=done, left=ticket.max_tokens - done)

    def _offer(self, manifest: Manifest, ticket: JobTicket, slow: Slow, done: int, stage: StageEntry) -> Offer | None:
        record, step_s = self._record(stage.peer_id), self._step_s(stage, stage.peer_id, more=1)
        if record is None or not step_s or self._is_resting(stage.peer_id):
            return None
        prefill_s = (stage.end - stage.start) * record.speed.prefill_ns / 1e9 or step_s
        row_bytes = manifest.hidden_size * ITEMSIZE[ACTIVATIONS[ticket.dtype]]
        replay_s = ticket.positions(done) * (prefill_s + row_bytes / DIRECT.bandwidth)
        way_s = self._way_s(manifest, ticket, slow.peer_id, stage.peer_id)
        return Offer(step_s + way_s + self._answer_s(slow.peer_id, stage.peer_id), replay_s)

    def away_s(self, manifest: Manifest, ticket: JobTicket, index: int) -> Callable[[WorkerView], float]:
        """What the lines to a stage's neighbours cost another worker for a step, in seconds."""
        return lambda view: self._way_s(manifest, ticket, ticket.stages[index].peer_id, view.peer_id)

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
        jobs, speed = self._jobs_at(record) + more, record.speed
        return (stage.end - stage.start) * (speed.decode_base_ns + max(jobs, 1) * speed.decode_token_ns) / 1e9

    def _usual_step_s(self, stage: StageEntry) -> float:
        record, usual = self._record(stage.peer_id), self._usual(stage.peer_id)
        if record is None or usual is None:
            return 0.0
        return usual.step_s(stage.end - stage.start, max(self._jobs_at(record), 1))

    def _jobs_at(self, record: WorkerRecord) -> int:
        return max(record.jobs, self._jobs(record.peer_id))

    def _lines(self, ticket: JobTicket, index: int) -> dict[str, float]:
        """Seconds that a step is on a stage's lines, by its own word; by neighbour, of those that it has measured."""
        count, record = len(ticket.stages), self._record(ticket.stages[index].peer_id)
        if record is None or count == 1:
            return {}
        rtts = {link.peer_id: link.rtt_us / 1e6 for link in record.links if link.rtt_us}
        around = [ticket.stages[(index + step) % count].peer_id for step in (-1, 1)]
        return {peer: around.count(peer) * rtts[peer] / 2 for peer in around if peer in rtts}

    def _way_s(self, manifest: Manifest, ticket: JobTicket, slow: str, peer_id: str) -> float:
        """What another worker's lines would cost, to those neighbours to which the slow one has measured its own."""
        neighbours = self._lines(ticket, ticket.stage_of(slow) or 0)
        records = [record for peer in {*neighbours, peer_id} if (record := self._record(peer)) is not None]
        views = {view.peer_id: view for view in views_for(manifest, records)}
        links = links_of(manifest, ticket.dtype, records)
        if peer_id not in views:
            return 0.0
        count = 2 if len(ticket.stages) == 2 else 1  # there and back on the same line
        return sum(count * links.link(views[peer_id], views[peer]).rtt_s / 2 for peer in neighbours if peer in views)

    def _answer_s(self, slow: str, peer_id: str) -> float:
        """What its answers add: as much as with the slow one usually, and by what they take longer than usually."""
        left, taken = self._usual(slow), self._usual(peer_id)
        usual_s = left.usual_answer_s or left.answer_s if left is not None else 0.0
        excess_s = (
            max(0.0, taken.answer_s - taken.usual_answer_s) if taken is not None and taken.usual_answer_s else 0.0
        )
        return (usual_s + excess_s) / 2
