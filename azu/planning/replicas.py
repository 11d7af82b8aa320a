"""The stages of a chain that is complete, and who is put to them.

**Replicas.** Workers left over go where they help most: first to stages that hang on one worker, or on workers of one
network that may fail together; then to the stage with the fewest tokens per second, which is all that the model gives.
What a worker has cached is preferred to a stage that is up to a quarter slower. One that is too small for a stage
holds halves of it together with others (see `stages`), and stays idle where there are none.

**Moves.** A worker that has layers is moved only where the gain clearly exceeds the cost: it runs no job, speeds were
measured, its stage is faster than the slowest by a quarter and by another tenth for each minute that the layers take to
load, and is not the slower one afterwards; or the slowest hangs on one worker alone, and its own on more than two. Each
move makes the slowest stages faster or safer, and planning again on the result changes nothing.

Complexity: O(W K + W log W) for W workers and a chain of K stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from azu.planning.chain import CACHED_IS_WORTH
from azu.planning.few import Score
from azu.planning.flow import largest_flow
from azu.planning.snapshot import ModelShape, Placement, Power, Range, WorkerView
from azu.planning.stages import SPREAD, Stage

__all__ = ["Plan", "Replicas"]

# A move's gain has to be so large, and so much larger for each second of loading.
_CLEARLY = 1.25
_ALMOST = 1 - 1e-9  # for rounding
_PER_SECOND = 0.1 / 60
_FETCH = 25e6  # bytes per second, from other peers
_READ = 400e6  # bytes per second, from a disk
# More moves than this wait for the next plan.
_MOST_MOVES = 64
_ROUNDS = 8
# Changes among workers that have nothing yet are free: they end where they are hardly worth it, or too many to look at.
_NOTICEABLY = 1.001
_UNEVEN = 1.01
_MOST_PAIRS = 400


class Plan(NamedTuple):
    """What changes, and what comes of it."""

    changes: tuple[Placement, ...]
    score: Score

    @property
    def held(self) -> dict[str, Range]:
        """What changes, by peer id."""
        return {p.peer_id: (p.start, p.end) for p in self.changes}


class Replicas:
    """The stages of a chain that is complete, and who is put to them."""

    def __init__(
        self,
        shape: ModelShape,
        chain: Iterable[Range],
        workers: Sequence[WorkerView],
        taken: Iterable[Placement],
        power: Mapping[str, Power],
    ) -> None:
        self._power = power
        self._stages = [Stage(shape, start, end) for start, end in chain]
        self._at: dict[str, Stage] = {}  # where each worker is, by peer id
        self._idle: dict[str, WorkerView] = {}
        self._strays: dict[str, WorkerView] = {}  # what these hold fits no chain
        self._hopeless: set[Stage] = set()  # there are not enough workers to make these safer
        self._given = {placement.peer_id: placement for placement in taken}
        self._chained = frozenset(self._given)
        self._had = {worker.peer_id: worker.held for worker in workers}
        for worker in workers:
            given = self._given.get(worker.peer_id)
            held = (given.start, given.end) if given else worker.held
            stage = self._find(held) if held else None
            if stage is not None:
                self._put(worker, stage)
            else:
                (self._strays if held else self._idle)[worker.peer_id] = worker

    def plan(self) -> Plan:
        """What changes, and what comes of it."""
        for _ in range(_ROUNDS):
            moves = 0
            placed = self._place_idle()
            if placed:
                self._even_out_all()
            while moves < _MOST_MOVES and self._move():
                moves += 1
            if not placed and not moves:
                break
        changes = tuple(p for p in self._given.values() if self._had.get(p.peer_id) != (p.start, p.end))
        safety = min(stage.safety for stage in self._stages)
        return Plan(changes, Score(safety, min(stage.rate for stage in self._stages)))

    def _find(self, range_: Range) -> Stage | None:
        around = (s for s in self._stages if s.start <= range_[0] and range_[1] <= s.end)
        return next((found for stage in around if (found := stage.find(range_))), None)

    def _put(self, worker: WorkerView, stage: Stage) -> None:
        stage.add(worker, self._power[worker.peer_id])
        self._at[worker.peer_id] = stage

    def _give(self, worker: WorkerView, stage: Stage) -> None:
        self._put(worker, stage)
        self._given[worker.peer_id] = Placement(worker.peer_id, *stage.range)

    def _place_idle(self) -> int:
        """Put every idle worker where it helps; how many found a place."""
        for worker in sorted(self._idle.values(), key=self._turn):
            # One that is too small for all of them may have to wait for others; the rest is of use at once.
            is_small = all(stage.need > worker.vram for stage in self._stages)
            for stage in sorted(self._stages, key=lambda stage: self._preference(stage, worker)):
                spot = stage.spot(worker, self._power[worker.peer_id])
                if spot is not None and (spot[0] > 0 or is_small):
                    self._give(worker, spot[1])
                    break
        found = [peer for peer in self._idle if peer in self._at]
        for stage in self._stages:
            for part in list(stage.useless()):
                self._withdraw(part)
                self._hopeless.add(stage)
        self._idle = {peer: worker for peer, worker in self._idle.items() if peer not in self._at}
        return sum(peer in self._at for peer in found)

    def _withdraw(self, part: Stage) -> None:
        """Leave those idle who were put where they help nobody."""
        for worker in [worker for worker in part.workers.values() if worker.peer_id in self._idle]:
            part.remove(worker)
            del self._at[worker.peer_id], self._given[worker.peer_id]

    def _even_out_all(self) -> None:
        """Let who was idle change places until that gains nothing, first in the smallest stages."""
        for stage in self._stages:
            for part in list(stage.whole_tree())[::-1]:
                while (halves := part.existing_halves()) and self._even_out(halves):
                    pass
        while self._even_out(self._stages):
            pass

    def _even_out(self, stages: Sequence[Stage]) -> bool:
        """Make the slowest of these stages faster: one worker comes from another stage, or two change places."""
        weak = min(stages, key=lambda stage: (stage.rate, stage.start))
        if max(stage.rate for stage in stages) < weak.rate * _UNEVEN:
            return False
        new = [None, *self._new(weak)]
        best: tuple[float, WorkerView, WorkerView | None, Stage] | None = None
        for stage in stages:
            comers = [worker for worker in self._new(stage) if stage is not weak and weak.need <= worker.vram]
            goers = [worker for worker in new if worker is None or stage.need <= worker.vram]
            if len(comers) * len(goers) > _MOST_PAIRS:
                goers = [None]
            for comer, goer in product(comers, goers):
                weaker = weak.rate + self._share(comer, weak) - (self._share(goer, weak) if goer else 0.0)
                other = stage.rate - self._share(comer, stage) + (self._share(goer, stage) if goer else 0.0)
                if min(weaker, other) > (best[0] if best else weak.rate * _NOTICEABLY):
                    best = min(weaker, other), comer, goer, stage
        if best is None:
            return False
        _, comer, goer, stage = best
        self._take(comer, stage, weak)
        if goer is not None:
            self._take(goer, weak, stage)
        return True

    def _new(self, stage: Stage) -> list[WorkerView]:
        """Who was put beside the chain by this plan, had nothing, not even cached, and does not keep it safe."""
        return [
            worker
            for peer, worker in stage.workers.items()
            if peer in self._given and peer not in self._chained
            if self._had[peer] is None and not worker.has_cached(stage.range)
            if stage.can_spare(worker) or stage not in self._stages
        ]

    def _turn(self, worker: WorkerView) -> tuple[int, float, str]:
        """Who chooses first: those who have the fewest places, then the fastest, as the last ones even out the rest."""
        fitting = sum(stage.need <= worker.vram for stage in self._stages)
        return fitting, -self._power[worker.peer_id].speed, worker.peer_id

    def _preference(self, stage: Stage, worker: WorkerView) -> tuple[int, bool, float, int]:
        """The lower, the better is it for the worker to be there."""
        helps = stage not in self._hopeless and stage.would_be_safer(worker)
        worth = CACHED_IS_WORTH if worker.has_cached(stage.range) else 1.0
        is_neighbour = helps and not stage.is_new_network(worker)
        return stage.safety if helps else SPREAD, is_neighbour, stage.rate * worth, stage.start

    def _move(self) -> bool:
        """Move one worker, if there is one whose move pays."""
        weak = min(self._stages, key=lambda stage: (stage.rate, stage.start))
        single = [stage for stage in self._stages if stage.is_single]
        return any(self._relieve(stage) for stage in single) or self._balance(weak)

    def _relieve(self, weak: Stage) -> bool:
        """Move a worker to a stage that hangs on one alone, from the fastest stage that keeps two."""
        for stage in sorted(self._stages, key=lambda stage: (-stage.rate, stage.start)):
            able = [w for w in stage.workers.values() if stage.can_spare(w) and self._may_move(w, weak)]
            if able:
                self._take(
                    max(able, key=lambda w: (w.has_cached(weak.range), -self._power[w.peer_id].speed)), stage, weak
                )
                return True
        return False

    def _balance(self, weak: Stage) -> bool:
        """Move a worker to the slowest stage, if that is slower than another by more than the move costs."""
        for worker in self._strays.values():
            pays = self._gains(weak, weak.rate + self._share(worker, weak), worker)
            if pays and self._may_move(worker, weak) and not self._slows(worker, weak):
                self._take(worker, None, weak)
                return True
        for stage in sorted(self._stages, key=lambda stage: (-stage.rate, stage.start))[:2]:
            moves = []
            for worker in stage.workers.values():
                left, gained = stage.rate - self._share(worker, stage), weak.rate + self._share(worker, weak)
                # The other stage must not become the slower one: else they would change places for ever.
                pays = left >= gained * _ALMOST and self._gains(weak, stage.rate, worker)
                if pays and stage.can_spare(worker) and self._may_move(worker, weak):
                    moves.append((gained, worker))
            for _, worker in sorted(moves, key=lambda move: -move[0]):
                if not self._slows(worker, weak):
                    self._take(worker, stage, weak)
                    return True
        return False

    def _slows(self, worker: WorkerView, stage: Stage) -> bool:
        """Whether a move costs more than it brings, as strays may complete each other, which no stage counts."""
        if not self._strays:
            return False
        now = {peer: at.range for peer, at in self._at.items()}
        now |= {peer: stray.held for peer, stray in self._strays.items() if stray.held}
        then = now | {worker.peer_id: stage.range}
        return self._flow(then) < self._flow(now)

    def _flow(self, held: Mapping[str, Range]) -> float:
        end = self._stages[-1].end
        return largest_flow(end, ((r, self._power[peer].rate(r[1] - r[0], end)) for peer, r in held.items()))

    def _share(self, worker: WorkerView, stage: Stage) -> float:
        return stage.share(self._power[worker.peer_id])

    def _may_move(self, worker: WorkerView, stage: Stage) -> bool:
        is_free = not worker.is_fixed and not worker.jobs and (worker.ready or worker.peer_id in self._given)
        return is_free and worker.decode_s > 0 and stage.need <= worker.vram

    def _gains(self, weak: Stage, rate: float, worker: WorkerView) -> bool:
        seconds = weak.need / (_READ if worker.has_cached(weak.range) else _FETCH)
        return rate > weak.rate * (_CLEARLY + seconds * _PER_SECOND)

    def _take(self, worker: WorkerView, stage: Stage | None, weak: Stage) -> None:
        if stage is None:
            del self._strays[worker.peer_id]
        else:
            stage.remove(worker)
        self._give(worker, weak)
