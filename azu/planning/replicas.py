"""Who holds what beside the chain of a plan.

**Replicas.** Workers left over go where they are worth most (see `levels`), the largest first, as the small ones even
out the rest: first to layers that hang on one worker, or on workers of one network that may fail together; then to
those with the fewest tokens per second. What a worker has cached is preferred to what is worth up to a quarter more.

**Moves.** A worker that has layers is moved only where the gain clearly exceeds the cost: it runs no job, speeds were
measured, each of its layers has more tokens than the weakest one by a quarter and by another tenth for each minute that
loading takes, and none has fewer afterwards than that one then; or a layer hangs on one worker alone, and each of its
own on more than two. It moves to a range that another worker holds, so that they go on to meet. Each move makes the
weakest layers stronger or safer, and planning again on the result changes nothing.

Complexity: O(W L + W log W) for W workers and L layers, and for each move O(W R) of R ranges with the weakest layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from azu.planning.flow import largest_flow
from azu.planning.levels import Levels, Pricing
from azu.planning.rating import Score
from azu.planning.snapshot import ModelShape, Placement, Power, Range, WorkerView
from azu.planning.steps import Steps

__all__ = ["Plan", "plan_around"]

# A move's gain has to be so large, and so much larger for each second of loading.
_CLEARLY = 1.25
_PER_SECOND = 0.1 / 60
_FETCH = 25e6  # bytes per second, from other peers
_READ = 400e6  # bytes per second, from a disk
# More moves than this wait for the next plan.
_MOST_MOVES = 64
# Those that had nothing choose anew so many times, once they see what the others chose; of large swarms, fewer times.
_ROUNDS = 8
_MOST_CHOICES = 600
_SINGLE = 1


class Plan(NamedTuple):
    """What changes, and what comes of it."""

    changes: tuple[Placement, ...]
    score: Score

    @property
    def held(self) -> dict[str, Range]:
        """What changes, by peer id."""
        return {p.peer_id: (p.start, p.end) for p in self.changes}


def plan_around(
    shape: ModelShape,
    workers: Sequence[WorkerView],
    taken: Iterable[Placement],
    power: Mapping[str, Power],
    pricing: Pricing = Pricing(),  # noqa: B008 - frozen
) -> Steps[Plan]:
    """What changes, and what comes of it, where some take what a chain lacks.

    Args:
        workers: by peer id.
    """
    levels = Levels(shape, workers, power, pricing)
    replicas = _Replicas(shape, workers, {p.peer_id: (p.start, p.end) for p in taken}, power, levels)
    yield from replicas.place_idle()
    yield from replicas.move_all()
    return replicas.plan()


class _Replicas:
    """Workers and what they are given."""

    def __init__(
        self,
        shape: ModelShape,
        workers: Sequence[WorkerView],
        taken: Mapping[str, Range],
        power: Mapping[str, Power],
        levels: Levels,
    ) -> None:
        self._shape = shape
        self._power = power
        self._workers = workers
        self._levels = levels
        for worker in workers:
            if (range_ := taken.get(worker.peer_id, worker.held)) is not None:
                self._levels.put(worker, range_)

    def plan(self) -> Plan:
        """What changes, and what comes of it."""
        levels = self._levels
        changes = tuple(
            Placement(worker.peer_id, *levels.held[worker.peer_id])
            for worker in self._workers
            if levels.held.get(worker.peer_id) not in (None, worker.held)
        )
        safety = min(levels.safety(layer) for layer in range(self._shape.n_layers))
        return Plan(changes, Score(safety, levels.worth()))

    def place_idle(self) -> Steps[None]:
        """Put everybody who has nothing where it is worth most."""
        idle = [worker for worker in self._workers if worker.peer_id not in self._levels.held]
        idle.sort(key=self._turn)
        for worker in idle:
            yield
            if (best := self._levels.best(worker)) is not None:
                self._levels.put(worker, best)
        rounds = min(_ROUNDS, _MOST_CHOICES // len(idle)) if idle else 0
        while rounds:
            changes = 0
            for worker in idle:
                yield
                changes += self._choose_again(worker)
            rounds = rounds - 1 if changes else 0

    def _turn(self, worker: WorkerView) -> tuple[int, float, str]:
        return -self._levels.most(worker.peer_id), -self._power[worker.peer_id].speed, worker.peer_id

    def _choose_again(self, worker: WorkerView) -> bool:
        if worker.peer_id not in self._levels.held:
            return False
        before = self._levels.take(worker)
        best = self._levels.best(worker) or before
        self._levels.put(worker, best)
        return best != before

    def move_all(self) -> Steps[None]:
        """Move workers as long as there is one whose move pays."""
        before = dict(self._levels.held)
        moves = 0
        yield
        while moves < _MOST_MOVES and self._move():
            moves += 1
            yield
        # Layers have more tokens then, but ranges may meet less.
        if moves and self._flow(self._levels.held) < self._flow(before):
            for worker in self._workers:
                if self._levels.held.get(worker.peer_id) != before.get(worker.peer_id):
                    self._levels.take(worker)
                    self._levels.put(worker, before[worker.peer_id])

    def _flow(self, held: Mapping[str, Range]) -> float:
        rates = ((r, self._power[peer].rate(r[1] - r[0], self._shape.n_layers)) for peer, r in held.items())
        return largest_flow(self._shape.n_layers, rates)

    def _move(self) -> bool:
        """Move one worker, if there is one whose move pays."""
        levels = self._levels
        single = next((layer for layer, ways in enumerate(levels.ways) if ways == _SINGLE), None)
        if single is not None and self._relieve(single):
            return True
        return self._balance(min(range(levels.n_layers), key=levels.tokens.__getitem__))

    def _relieve(self, weak: int) -> bool:
        """Move a worker to a layer that hangs on one alone, from the strongest layers that keep two."""
        found = [
            (self._least(worker), worker.has_cached(target), -self._power[worker.peer_id].speed, target, worker)
            for worker, held in self._movable()
            if self._levels.can_spare(worker, iter(range(*held)))
            for target in self._targets(worker, weak)
        ]
        return self._go(found)

    def _balance(self, weak: int) -> bool:
        """Move a worker to the weakest layer, if that is weaker than all of its own by more than the move costs."""
        tokens = self._levels.tokens
        floor = tokens[weak] * _CLEARLY
        found = []
        for worker, held in self._movable():
            if (least := self._least(worker)) <= floor:
                continue
            for target in self._targets(worker, weak):
                gained = tokens[weak] + self._levels.rate(worker.peer_id, target[1] - target[0])
                left = [layer for layer in range(*held) if not target[0] <= layer < target[1]]
                pays = least > tokens[weak] * (_CLEARLY + self._seconds(worker, target) * _PER_SECOND)
                if pays and self._keeps(worker, target, gained) and self._levels.can_spare(worker, iter(left)):
                    found.append((gained, worker.has_cached(target), least, target, worker))
        return self._go(found)

    def _keeps(self, worker: WorkerView, target: Range, gained: int) -> bool:
        """Whether none of a worker's layers has less, after it went, than the weakest one with it."""
        start, end = self._levels.held[worker.peer_id]
        gone = self._levels.rate(worker.peer_id, end - start)
        come = self._levels.rate(worker.peer_id, target[1] - target[0])
        return all(
            self._levels.tokens[layer] - gone + (come if target[0] <= layer < target[1] else 0) >= gained
            for layer in range(start, end)
        )

    def _go(self, found: Sequence[tuple[float, bool, float, Range, WorkerView]]) -> bool:
        """Make the best of these moves."""
        if not found:
            return False
        *_, target, worker = max(found, key=lambda each: (*each[:3], each[3], each[4].peer_id))
        self._levels.take(worker)
        self._levels.put(worker, target)
        return True

    def _movable(self) -> Iterator[tuple[WorkerView, Range]]:
        for worker in self._workers:
            held = self._levels.held.get(worker.peer_id)
            is_loaded = worker.ready or held != worker.held
            if held and is_loaded and worker.decode_s > 0 and not (worker.is_fixed or worker.jobs):
                yield worker, held

    def _targets(self, worker: WorkerView, weak: int) -> list[Range]:
        """Ranges with this layer that others hold and that it could hold too."""
        ranges = {each for each in self._levels.held.values() if each[0] <= weak < each[1]}
        ranges.discard(self._levels.held[worker.peer_id])
        return [each for each in ranges if self._shape.stage_bytes(*each) <= worker.vram]

    def _least(self, worker: WorkerView) -> int:
        start, end = self._levels.held[worker.peer_id]
        return min(self._levels.tokens[start:end])

    def _seconds(self, worker: WorkerView, target: Range) -> float:
        return self._shape.stage_bytes(*target) / (_READ if worker.has_cached(target) else _FETCH)
