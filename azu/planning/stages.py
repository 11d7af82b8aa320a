"""A stage of the chain with all that runs it: workers that hold it whole, and ones that hold halves of it together.

A worker that is too small for a stage may hold one of its halves, or of their halves, so that every chain's borders
are among the finer ones' and a job can change over at each of them. What a stage gives is then

    tokens per second = those of the workers that hold it whole + the lesser of its two halves'

which is the largest flow through it, since all that runs it is in series or beside another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from azu.planning.chain import CACHED_IS_WORTH
from azu.planning.snapshot import ModelShape, Power, Range, WorkerView

__all__ = ["SPREAD", "Stage"]

# A stage's safety: nobody runs it, one worker, several in one network, workers in several networks.
_NOBODY, _SINGLE, _TOGETHER, SPREAD = range(4)


class Stage:
    """Layers [start, end); a node of the tree of halves below a stage of the chain.

    Attributes:
        rate: tokens per second through it. safety: see SPREAD. workers: those that hold it whole, by peer id.
    """

    __slots__ = (
        *("start", "end", "need", "rate", "workers"),
        *("_above", "_halves", "_members", "_networks", "_own", "_shape", "_tokens", "_ways"),
    )

    def __init__(self, shape: ModelShape, start: int, end: int, above: Stage | None = None) -> None:
        self.start, self.end = start, end
        self.need = shape.stage_bytes(start, end)
        self.workers: dict[str, WorkerView] = {}
        self.rate = 0.0
        self._shape = shape
        self._above = above
        self._halves: tuple[Stage, Stage] | None = None
        self._tokens: dict[str, float] = {}
        self._own = 0.0
        self._members: Counter[str] = Counter()  # workers by network
        self._ways = 0
        self._networks = 0

    @property
    def range(self) -> Range:
        """Its [start, end)."""
        return self.start, self.end

    @property
    def safety(self) -> int:
        """How many must fail before nobody runs it: see SPREAD."""
        return min(self._ways, _TOGETHER) if self._networks < _TOGETHER else SPREAD

    @property
    def is_single(self) -> bool:
        """Whether it hangs on one worker."""
        return self._ways == _SINGLE

    def halves(self) -> tuple[Stage, Stage] | None:
        """Its two halves, None where it is one layer."""
        if self._halves is None and self.end - self.start > 1:
            middle = (self.start + self.end) // 2
            self._halves = Stage(self._shape, self.start, middle, self), Stage(self._shape, middle, self.end, self)
        return self._halves

    def existing_halves(self) -> tuple[Stage, ...]:
        """Its halves, none where nobody was ever put there."""
        return self._halves or ()

    def share(self, power: Power) -> float:
        """Tokens per second that a worker of this power adds by holding it whole."""
        return power.rate(self.end - self.start, self._shape.n_layers)

    def find(self, range_: Range) -> Stage | None:
        """The stage of exactly these layers, in the tree from here."""
        if range_ == self.range:
            return self
        for half in self.halves() or ():
            if half.start <= range_[0] and range_[1] <= half.end:
                return half.find(range_)
        return None

    def add(self, worker: WorkerView, power: Power) -> None:
        """Have a worker hold it whole."""
        self.workers[worker.peer_id] = worker
        self._tokens[worker.peer_id] = self.share(power)
        self._members[worker.network or worker.peer_id] += 1
        self._changed()

    def remove(self, worker: WorkerView) -> None:
        """Have a worker hold it no longer."""
        del self.workers[worker.peer_id], self._tokens[worker.peer_id]
        network = worker.network or worker.peer_id
        self._members[network] -= 1
        if not self._members[network]:
            del self._members[network]
        self._changed()

    def _changed(self) -> None:
        # Sums are rounded once, whatever the order: the same workers have to give the same plan.
        self._own = math.fsum(self._tokens.values())
        self._refresh()

    def _refresh(self) -> None:
        self.rate = self._own
        self._ways, self._networks = len(self.workers), len(self._members)
        if self._halves is not None:
            one, other = self._halves
            self.rate += min(one.rate, other.rate)
            self._ways += min(one._ways, other._ways)
            self._networks += min(one._networks, other._networks)
        if self._above is not None:
            self._above._refresh()

    def would_be_safer(self, worker: WorkerView) -> bool:
        """Whether this worker brings it, or helps to bring it, to a higher safety."""
        if self.need > worker.vram:
            return self._ways <= _SINGLE
        return self._ways <= _SINGLE or (self._networks < _TOGETHER and self.is_new_network(worker))

    def is_new_network(self, worker: WorkerView) -> bool:
        """Whether nobody of the worker's network holds it whole."""
        return (worker.network or worker.peer_id) not in self._members

    def can_spare(self, worker: WorkerView) -> bool:
        """Whether it stays as safe, and off a single worker, without one that holds it whole."""
        is_last = self._members[worker.network or worker.peer_id] == 1
        return self._ways > _TOGETHER and not (is_last and self._networks == _TOGETHER)

    def spot(self, worker: WorkerView, power: Power) -> tuple[float, Stage] | None:
        """Where in the tree a worker adds most, and how many tokens per second; None where it fits nowhere.

        What has no gain yet is a place too: a half whose other half nobody holds.
        """
        found = (self.share(power), self) if self.need <= worker.vram else None
        if found is not None and self._halves is None:
            return found
        if (halves := self.halves()) is None:
            return None
        weak, strong = sorted(halves, key=lambda half: (half.rate * _worth(half, worker), half.start))
        if found is not None and strong.rate - weak.rate <= found[0]:
            return found
        if (inside := weak.spot(worker, power)) is not None:
            gain = max(0.0, min(inside[0], strong.rate - weak.rate))
            return (gain, inside[1]) if found is None or gain > found[0] else found
        if found is None and (inside := strong.spot(worker, power)) is not None:
            return 0.0, inside[1]
        return found

    def useless(self) -> Iterator[Stage]:
        """The stages below whose workers help nobody, since the other half is held by nobody."""
        for half, other in zip(self._halves or (), (self._halves or ())[::-1], strict=True):
            yield from half.useless()
            if other.rate == 0.0 and half.rate > 0.0:
                yield from half.whole_tree()

    def whole_tree(self) -> Iterator[Stage]:
        """It, and all below."""
        yield self
        for half in self._halves or ():
            yield from half.whole_tree()


def _worth(half: Stage, worker: WorkerView) -> float:
    near = any(start < half.end and half.start < end for start, end in worker.cached)
    return CACHED_IS_WORTH if near else 1.0
