"""Where a job that loses a stage, or leaves one, finds others for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from azu.tickets import JobTicket
from coordinator.hedging import Part, Reading, Slow

__all__ = ["Change", "Reserves"]


class Change(NamedTuple):
    """Other workers for stages; see `coordinator.crew.Crew.amend`.

    Attributes:
        peers: by the stage's index, in `cut` if there is one.
        left: the stages whose workers leave properly, by their index until now.
        cut: the ticket with other stages in the place of some, and what these are paid for.
    """

    peers: Mapping[int, str]
    left: tuple[int, ...] = ()
    cut: JobTicket | None = None


@dataclass(frozen=True, slots=True)
class Reserves:
    """Other workers for a job's stages. What it names counts as running the stage from then on.

    Attributes:
        substitutes: for the stages of these indices, for which those given last are not wanted; None while there are
            none.
        relief: for a stage that is slow, after so many tokens; None where a move is not worth it.
        parts: what a step costs in each stage.
        cache_s: seconds that it takes to send the KV cache of so many positions of this stage to that peer, where
            this is faster than to have the peer compute it; else None.
        cut: as `substitutes`, where that finds nobody: several workers in a row. These are paid for what the ticket
            pays for in the stages which they take over.
    """

    substitutes: Callable[[JobTicket, Collection[int], Collection[str]], Mapping[int, str] | None]
    relief: Callable[[JobTicket, Slow, int, Collection[str]], Change | None]
    parts: Callable[[JobTicket], Mapping[Part, Reading]]
    cache_s: Callable[[JobTicket, int, str, int], float | None]
    cut: Callable[[JobTicket, Collection[int], Collection[str]], Change | None]
