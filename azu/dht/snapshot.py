"""What a look into the DHT found: records whose signatures hold, and counts of what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from azu.records import CoordinatorRecord, Record, WorkerRecord

__all__ = ["Pong", "Route", "Seen", "Snapshot"]

R = TypeVar("R", bound=Record, covariant=True)

Route = Literal["direct", "relayed"]


@dataclass(frozen=True, slots=True)
class Pong:
    """A peer's answer to a ping. rtt: seconds; route: how it went and came."""

    rtt: float
    route: Route


@dataclass(frozen=True, slots=True)
class Seen(Generic[R]):
    """A peer's live record. pong: None if it did not answer, or was not asked."""

    record: R
    pong: Pong | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The swarm at `taken_at` (unix seconds). Only live records are in it.

    expired, early: records that are no longer in force, and not yet, by the clock here. silent: peers that announced
    themselves, but have no record. clock_ahead: seconds by which the clock here seems to be ahead of those of peers
    that answer though their records are out of force, negative where it is behind; None if there is no such peer, or
    somebody's record is live.
    """

    taken_at: float
    workers: tuple[Seen[WorkerRecord], ...] = ()
    coordinators: tuple[Seen[CoordinatorRecord], ...] = ()
    expired: int = 0
    early: int = 0
    silent: int = 0
    clock_ahead: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no live peer was found."""
        return not self.workers and not self.coordinators
