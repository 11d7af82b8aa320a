"""Who takes stages over: one worker for each, else several in a row."""

from __future__ import annotations

from collections.abc import Sequence

from azu.planning import Links, WorkerView
from azu.tickets import JobTicket, Sampling
from coordinator.reserves import Change, find_others
from tests.coordinator.planning.test_stretch import PEERS, ready, stages_of

STAGES = stages_of(0, 2, 4, 8)
TICKET = JobTicket(
    job_id=bytes(16),
    epoch=3,
    manifest="ab" * 32,
    n_layers=8,
    stages=tuple(STAGES),
    dtype="float32",
    prompt_tokens=5,
    max_tokens=5,
    stop_tokens=(),
    sampling=Sampling(),
    price=1,
    begun_at=0,
    issued_at=0,
    expires_at=600,
    coordinator=PEERS[-1],
)


def found(lost: set[int], workers: Sequence[WorkerView], unwanted: set[str] = frozenset()) -> Change | None:  # type: ignore[assignment]
    return find_others(TICKET, lost, unwanted, workers, Links(), 10, lambda _: True, lambda _: 0.0)


def test_one_for_each_comes_first() -> None:
    workers = [ready(5, (2, 4)), ready(6, (4, 6)), ready(7, (6, 8)), ready(8, (4, 8))]
    assert found({1, 2}, workers) == Change({1: PEERS[5], 2: PEERS[8]})
    assert found({1, 2}, workers, {PEERS[5]}) is None
    several = found({2}, workers, {PEERS[8]})
    assert several is not None
    assert several.peers == {2: PEERS[6], 3: PEERS[7]}
    assert several.cut is not None
    assert several.cut.stages[:2] == TICKET.stages[:2]


def test_who_is_back_is_given_its_own_stage_anew() -> None:
    """It has forgotten the job, also where its stage is as it was before."""
    change = found({1, 2}, [ready(1, (2, 4)), ready(6, (4, 6)), ready(7, (6, 8))])
    assert change is not None
    assert change.peers == {1: PEERS[1], 2: PEERS[6], 3: PEERS[7]}
