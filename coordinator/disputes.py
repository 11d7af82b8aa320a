"""Who is held to account when the receipts of two neighbours disagree.

One of the two lies, and their coordinator cannot tell which. Both stages' earnings of that job are held for the
operator to decide, and both count a fault, so that jobs go to others for some minutes. A liar is told from those that
it met by meeting many: who has disagreed with three others, of whom this one has disagreed with fewer, takes the fault
alone. No money moves by this: it only decides who gets the next jobs, and what the operator is shown.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

from azu.errors import AzuError, TrustError
from coordinator.generation import JobReport

__all__ = ["COMMON", "Disputes", "pairs_of", "partners"]

# So many others have to disagree with a peer before it is named.
COMMON = 3
# A dispute counts for this long, and so many are remembered.
_LATELY_S = 3_600.0
_MAX_PAIRS = 1_024
# As faults weigh elsewhere: against the peer that is at fault, and against one that may be.
_AT_FAULT, _SUSPECT = 2, 1

Pair = tuple[str, str]


def pairs_of(report: JobReport) -> tuple[Pair, ...]:
    """Who disagreed with whom in a job, each two once, the lesser peer id first."""
    stages = (stage for stage in report.stages if stage.reason == "contradicted")
    found = {(min(stage.peer_id, other), max(stage.peer_id, other)) for stage in stages for other in stage.against}
    return tuple(sorted(found))


def partners(pairs: Iterable[Pair]) -> dict[str, set[str]]:
    """With whom each peer has disagreed."""
    met: dict[str, set[str]] = defaultdict(set)
    for one, other in pairs:
        met[one].add(other)
        met[other].add(one)
    return dict(met)


class Disputes:
    """The disagreements of late.

    Args:
        coordinator: our own peer id, whose word is not in doubt.
    """

    def __init__(self, coordinator: str) -> None:
        self._coordinator = coordinator
        self._pairs: deque[tuple[float, Pair]] = deque(maxlen=_MAX_PAIRS)

    def judge(self, report: JobReport, now: float) -> tuple[tuple[str, int, AzuError], ...]:
        """Whose fault the disagreements of a job are taken for, and how much each weighs. now: of a steady clock."""
        verdicts: list[tuple[str, int, AzuError]] = []
        for pair in pairs_of(report):
            self._pairs.append((now, pair))
            met = partners(each for at, each in self._pairs if now - at < _LATELY_S)
            error = TrustError(f"the receipts of {pair[0]} and {pair[1]} disagree", code="receipts_disagree")
            verdicts += [(peer_id, weight, error) for peer_id, weight in self._weigh(pair, met).items()]
        return tuple(verdicts)

    def _weigh(self, pair: Pair, met: dict[str, set[str]]) -> dict[str, int]:
        if self._coordinator in pair:
            return {peer_id: _AT_FAULT for peer_id in pair if peer_id != self._coordinator}
        fewer, more = sorted(pair, key=lambda peer_id: len(met[peer_id]))
        if len(met[more]) >= COMMON and len(met[fewer]) < len(met[more]):
            return {more: _AT_FAULT}
        return dict.fromkeys(pair, _SUSPECT)
