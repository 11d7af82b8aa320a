"""The kinds of records that azu keeps in the DHT, and how far a record can be relied on now. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from azu.records import (
    COORDINATOR_NAMESPACE,
    COORDINATORS_KEY,
    WORKER_NAMESPACE,
    WORKERS_KEY,
    CoordinatorRecord,
    Record,
    WorkerRecord,
    is_live,
    open_coordinator_record,
    open_worker_record,
)

__all__ = ["COORDINATOR", "KINDS", "WORKER", "Kind", "Standing", "standing"]

R = TypeVar("R", bound=Record, covariant=True)

Standing = Literal["live", "expired", "early"]  # early: issued in the future, by the clock here


@dataclass(frozen=True, slots=True)
class Kind(Generic[R]):
    """One kind. meeting_key: the provider key that all its peers announce; read: checks and decodes a record."""

    name: str
    namespace: str
    meeting_key: bytes
    read: Callable[[bytes], R]

    def key(self, peer_id: str) -> str:
        """Where a peer's record lies."""
        return f"/{self.namespace}/{peer_id}"


WORKER = Kind("worker", WORKER_NAMESPACE, WORKERS_KEY, open_worker_record)
COORDINATOR = Kind("coordinator", COORDINATOR_NAMESPACE, COORDINATORS_KEY, open_coordinator_record)
KINDS: tuple[Kind[WorkerRecord] | Kind[CoordinatorRecord], ...] = (WORKER, COORDINATOR)


def standing(record: Record, now: float) -> Standing:
    """Whether a record is in force at `now` (unix seconds), and if not, why."""
    if is_live(record, now):
        return "live"
    return "expired" if now > record.expires_at else "early"
