"""How a job goes on when peers have taken stages over. Pure: what the stages hold goes in, where each begins comes out.

A position is worth keeping where its token is known: prompt and sampled tokens that the coordinator, the last stage or
the first one has. Whatever a cache holds beyond that, its stage begins afresh. A stage can begin behind the next one:
it then computes what it lacks and sends on what the next one lacks. It can begin before the next one where it still
has what it sent for the positions between. Where it has not, it begins afresh, and the stage before it feeds it in the
same way, the first one from the tokens themselves. So nothing is computed that nobody lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Held", "Start", "settle", "work_of"]


@dataclass(frozen=True, slots=True)
class Held:
    """What a paused stage has of a job.

    position: positions in its cache. can_replay: whether it has what it sent for all of them from `replay_from` on.
    tokens: sampled ones that it knows beyond the coordinator's. is_new: whether it has run nothing of the job itself.
    """

    position: int = 0
    can_replay: bool = True
    tokens: tuple[int, ...] = ()
    is_new: bool = False
    replay_from: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Where a stage begins, and from which position on it sends what it computes, or has computed, to the next."""

    position: int
    send_from: int


def settle(
    prompt_tokens: int, known: int, came: Sequence[int], stages: Sequence[Held]
) -> tuple[tuple[int, ...], tuple[Start, ...]]:
    """Where each stage of a paused job begins.

    Args:
        known: sampled tokens that the coordinator had when it had the job paused.
        came: those that have come since.
        stages: in their order; a stage that was replaced holds nothing.

    Returns:
        The tokens that follow those `known`, as many as anybody has, and a start for each stage.
    """
    first, last = stages[0], stages[-1]
    # What the first stage was told, the last one sampled; only one that was replaced knows less.
    tokens = first.tokens if last.is_new or not last.position else last.tokens
    if tokens[: len(came)] != tuple(came):  # the client has these
        tokens = tuple(came)
    base = prompt_tokens + known + len(tokens)  # positions whose tokens are known
    positions = [held.position if held.position <= base else 0 for held in stages]
    if last.position >= base:  # it has to run the last known token, to sample the next one
        positions[-1] = 0
    for index in (0, -1):
        if stages[index].tokens != tokens[: len(stages[index].tokens)]:  # it ran others
            positions[index] = 0
    for index in reversed(range(len(stages) - 1)):
        held, lacked = stages[index], positions[index + 1]
        if positions[index] > lacked and not (held.can_replay and held.replay_from <= lacked):
            positions[index] = 0
    following = (*positions[1:], 0)  # the last stage sends tokens only
    return tokens, tuple(Start(*each) for each in zip(positions, following, strict=True))


def work_of(layers: Sequence[int], base: int, stages: Sequence[Held], starts: Sequence[Start]) -> tuple[int, int]:
    """Token-layers that are computed up to position `base` by stages that held nothing, and again by the others.

    Args:
        layers: of each stage.
    """
    each = list(zip(layers, stages, starts, strict=True))
    anew = sum(count * base for count, held, _ in each if not held.position)
    return anew, sum(count * (held.position - start.position) for count, held, start in each)
