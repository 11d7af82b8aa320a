"""Who has to hold what, so that every layer is held by two workers, or by workers of two networks.

From the first layer on: the first one that is not safe yet has to be held by one more, and no layers of a worker's are
of more use than those that begin there, or as little before as can be, since all layers before are safe already. So it
is only a matter of whom to take, which is tried in turn, the largest first.

Bounded: `_MOST_LOOKS`. Finding nothing does not mean that there is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from azu.planning.rating import Held, Rater
from azu.planning.snapshot import Range
from azu.planning.steps import Steps

__all__ = ["secure"]

_MOST_LOOKS = 1_500
_LOOKS_A_STEP = 32
_ENOUGH = 2


def secure(rater: Rater, held: Held, free: Sequence[str], *, spread: bool) -> Steps[dict[str, Range] | None]:
    """What some of those who are free hold beside what is `held`, so that each layer is held twice; None if not found.

    Args:
        spread: by workers of two networks.
    """
    search = _Search(rater, held, spread)
    found = yield from search.cover(0, {}, rater.able(free))
    return found


class _Search:
    def __init__(self, rater: Rater, held: Held, spread: bool) -> None:
        self._rater = rater
        self._looks = 0
        # What counts as another holder: another worker, or one of another network.
        self._group = {peer_id: rater.network(peer_id) if spread else peer_id for peer_id in rater.windows}
        self._there: list[list[str]] = [[] for _ in range(rater.n_layers)]
        self._spread = spread
        for peer_id, range_ in held.items():
            self._put(peer_id, range_)

    def _put(self, peer_id: str, range_: Range) -> list[list[str]]:
        """Have a worker hold these layers; at which of them it counts."""
        group = self._group[peer_id]
        counts = [there for there in self._there[range_[0] : range_[1]] if group not in there]
        for there in counts:
            there.append(group)
        return counts

    def cover(self, first: int, taken: dict[str, Range], able: Sequence[str]) -> Steps[dict[str, Range] | None]:
        """Make the layers from the first one on safe, by some of these workers beside those that are taken."""
        there = self._there
        first = next((layer for layer in range(first, len(there)) if len(there[layer]) < _ENOUGH), len(there))
        if first == len(there):
            return taken
        rater = self._rater
        lacking = sum(max(0, _ENOUGH - len(groups)) for groups in there[first:])
        tried = set()
        for peer_id in able if lacking <= sum(rater.most(each) for each in able) else ():
            self._looks += 1
            if not self._looks % _LOOKS_A_STEP:
                yield
            if self._looks > _MOST_LOOKS:
                return None
            kind = rater.windows[peer_id], self._group[peer_id] if self._spread else ""
            range_ = next((r for r in reversed(rater.windows[peer_id]) if r[0] <= first < r[1]), None)
            if kind in tried or range_ is None or self._group[peer_id] in there[first]:
                continue
            tried.add(kind)
            counts = self._put(peer_id, range_)
            rest = [each for each in able if each != peer_id]
            if (found := (yield from self.cover(first, {**taken, peer_id: range_}, rest))) is not None:
                return found
            for groups in counts:
                groups.pop()
        return None
