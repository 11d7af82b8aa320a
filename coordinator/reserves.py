"""Where a job that loses a stage, or leaves one, finds others for it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from azu.planning import Links, WorkerView
from azu.tickets import JobTicket, StageEntry
from coordinator.hedging import Part, Reading, Slow
from coordinator.planning import cut_anew, stand_in

__all__ = ["Accepts", "Change", "Reserves", "find_others"]

# Whether the best peers that were found for stages will do; no others are looked for.
Accepts = Callable[[Sequence[StageEntry]], bool]


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
        others: for the stages of these indices, for which those given last are not wanted; None while there are none.
            Where nobody has a stage's all, several in a row, which are paid for what the ticket pays for there.
        relief: for a stage that is slow, after so many tokens; None where a move is not worth it.
        parts: what a step costs in each stage.
        cache_s: seconds that it takes to send the KV cache of so many positions of this stage to that peer, where
            this is faster than to have the peer compute it; else None.
    """

    others: Callable[[JobTicket, Collection[int], Collection[str]], Change | None]
    relief: Callable[[JobTicket, Slow, int, Collection[str]], Change | None]
    parts: Callable[[JobTicket], Mapping[Part, Reading]]
    cache_s: Callable[[JobTicket, int, str, int], float | None]


def find_others(
    ticket: JobTicket,
    lost: Collection[int],
    unwanted: Collection[str],
    workers: Sequence[WorkerView],
    links: Links,
    tokens: int,
    accepts: Accepts,
    away_s: Callable[[WorkerView], float],
) -> Change | None:
    """A worker for each of the stages of these indices; else several in a row; or None.

    Args:
        unwanted: peers.
        tokens: positions for which each has to have room at once.
        away_s: seconds of a step that a worker costs beside its layers.
    """
    staying = {stage.peer_id for index, stage in enumerate(ticket.stages) if index not in lost}
    peers = _one_for_each(ticket, lost, staying.union(unwanted), workers, tokens, accepts, away_s)
    if peers is not None:
        return Change(peers)
    stages = cut_anew(ticket.stages, lost, workers, tokens, without=unwanted, links=links, prompt=ticket.prompt_tokens)
    if stages is None:
        return None
    found = {index: stage for index, stage in enumerate(stages) if stage.peer_id not in staying}
    if not accepts(list(found.values())):
        return None
    cut = ticket.model_copy(update={"stages": stages})
    return Change({index: stage.peer_id for index, stage in found.items()}, cut=cut)


def _one_for_each(
    ticket: JobTicket,
    lost: Collection[int],
    without: set[str],
    workers: Sequence[WorkerView],
    tokens: int,
    accepts: Accepts,
    away_s: Callable[[WorkerView], float],
) -> dict[int, str] | None:
    found: dict[int, str] = {}
    for index in lost:
        stage, used = ticket.stages[index], without.union(found.values())
        chosen = stand_in(workers, stage.start, stage.end, tokens, without=used, parts=True, away_s=away_s)
        if chosen is None or not accepts([stage.model_copy(update={"peer_id": chosen.peer_id})]):
            return None
        found[index] = chosen.peer_id
    return found
