"""What a look into the DHT found: records whose signatures hold, and counts of what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from azu.records import CoordinatorRecord, Record, WorkerRecord

__all__ = ["Seen", "Snapshot"]

R = TypeVar("R", bound=Record, covariant=True)


@dataclass(frozen=True, slots=True)
class Seen(Generic[R]):
    """A peer's live record. rtt: seconds; None if it did not answer, or was not asked."""

    record: R
    rtt: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The swarm at `taken_at` (unix seconds). Only live records are in it.

    expired: records out of force, by the clock here. silent: peers that announced themselves, but have no record.
    """

    taken_at: float
    workers: tuple[Seen[WorkerRecord], ...] = ()
    coordinators: tuple[Seen[CoordinatorRecord], ...] = ()
    expired: int = 0
    silent: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether no live peer was found."""
        return not self.workers and not self.coordinators
