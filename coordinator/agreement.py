"""Whether those who took part in a job agree on it. Pure.

    coordinator ─prompt─► first ──► ... ──► last ─tokens─► coordinator
                            ▲                 │
                            └─────tokens──────┘

At each seam two parties say what went over it: two stages in their receipts, or a stage and the coordinator, which sent
the prompt and saw the tokens itself. A stage is credited if

- its receipt confirms as many positions as the coordinator counts,
- nobody contradicts it at either of its seams, and
- somebody else's word agrees with its own at one of them at least: a stage that died and gives no receipt does not cost
  its neighbours their pay.

The same holds for a stage that another worker took over because the first one left properly: it gives its receipt then,
and what its neighbours say of the epoch that ends there comes with their word that they are paused.

A receipt that confirms less is as good as none. Where two receipts disagree, nobody can tell which one lies: both
stages are held. The first stage's input is the last one's output, so a first stage that saw other tokens than the
coordinator disagrees with the last one; a last stage that says it sent others than came is wrong by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from azu.crossings import Crossing, token_crossing
from azu.tickets import JobTicket, Receipt

__all__ = ["Finding", "Handover", "HeldReason", "Word", "compare", "word_of"]

# no_receipt: none came that is the stage's own for this job and epoch. short: it confirms fewer positions than the
# coordinator counts. contradicted: by others' word. unwitnessed: nobody else is there to confirm it.
HeldReason = Literal["no_receipt", "short", "contradicted", "unwitnessed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a stage's earnings are held, and whose word is against it, by peer id; no reason where they are not."""

    reason: HeldReason | None = None
    against: tuple[str, ...] = ()


class Word(NamedTuple):
    """What a stage says of one epoch: positions that it ran, and what it took and gave."""

    positions: int
    received: Crossing
    sent: Crossing


def word_of(receipt: Receipt) -> Word:
    """What a receipt says."""
    return Word(receipt.tokens, receipt.received, receipt.sent)


@dataclass(slots=True)
class Handover:
    """Stages that were left properly, in the middle of a job.

    ticket: in force until then. tokens: so many had come. left: the stages. receipts: theirs, with their envelopes.
    words: of the stages that stayed.
    """

    ticket: JobTicket
    tokens: int
    left: tuple[int, ...]
    receipts: dict[int, tuple[bytes, Receipt]] = field(default_factory=dict)
    words: dict[int, Word] = field(default_factory=dict)


def compare(
    ticket: JobTicket, prompt: Sequence[int], tokens: Sequence[int], said: Mapping[int, Word]
) -> tuple[Finding, ...]:
    """What is found of each stage of a job, of which these tokens came.

    Args:
        said: by stage; each one's own, for this ticket.
    """
    positions = ticket.positions(len(tokens))
    words = {index: word for index, word in said.items() if word.positions >= positions}
    peers = [stage.peer_id for stage in ticket.stages]
    against: dict[int, set[str]] = {index: set() for index in range(len(peers))}
    agreed: set[int] = set()
    for sides, is_agreed in _seams(ticket, prompt, tokens, words):
        if is_agreed:
            agreed.update(sides)
            continue
        for side in sides:
            against[side].update({peers[other] for other in sides if other != side} or {ticket.coordinator})

    def find(index: int) -> Finding:
        if index not in said:
            return Finding("no_receipt")
        if index not in words:
            return Finding("short")
        if against[index]:
            return Finding("contradicted", tuple(sorted(against[index])))
        return Finding() if index in agreed else Finding("unwitnessed")

    return tuple(map(find, range(len(peers))))


def _seams(
    ticket: JobTicket, prompt: Sequence[int], tokens: Sequence[int], words: Mapping[int, Word]
) -> Iterator[tuple[tuple[int, ...], bool]]:
    """The stages at each seam of which both sides have a word, and whether they agree. A lone one has the
    coordinator at its other side.
    """
    last = len(ticket.stages) - 1
    for giver in range(last):
        if giver in words and giver + 1 in words:
            yield (giver, giver + 1), words[giver].sent == words[giver + 1].received
    if last in words:
        yield (last,), words[last].sent == token_crossing(ticket.prompt_tokens, tokens)
    if 0 in words:
        ran = [*prompt, *tokens][: ticket.positions(len(tokens))]
        is_agreed = words[0].received == token_crossing(0, ran)
        yield (0,) if is_agreed or not last else (0, last), is_agreed
