"""Which workers run a job: the chain with the least expected time for it under the present load. Pure.

A token costs each stage's layers, in a pass with the jobs that the worker has already, and a hop from stage to stage
and from the last to the first (see docs/design.md, the ring): the line, and handling at its ends. The prompt costs each
stage's layers for each of its positions, and one longer hop from stage to stage; that chunks of it overlap is left out.
That is a shortest path over the borders between layers, found by dynamic programming; of equal ones the path with the
fewest stages, then with the fewest jobs. The hop that closes the ring joins both ends of the path, so paths are
searched for one first worker after the other, and only while what the rest takes at least is less than what was found.

**Parts.** Workers that can run a part of what they hold are entered and left at any border. A path could then come back
to a worker, and a job has one stage for each peer: such a path is no route, and the search goes on in three smaller
problems (the worker ends before that border, begins at it, or runs both layers beside it). In the order of what each
takes at least, the first that is a route is the best one. After `_MOST_SPLITS` of them a chain of whole ranges is
taken, if there is one.

Where lines differ no more than `_MOST_FIRSTS` first workers are tried, the most promising ones first. Where very many
hold a layer, only those are looked at that are among its `_MOST_HOLDERS` quickest, hops counted over all that they
hold, for one of their layers.

**Lines.** One that was not measured is a sum of what its ends are away (see `Links`), so the best of all workers to
come from is the same for all that are entered, but for those with which a worker has a measured line.

Complexity: for W workers on L layers, O(W log W + L (R log R + M)) for whole ranges, where R replicas meet at a border
and M is how many lines of theirs were measured, and with parts the same for P workers that hold a layer, of which no
more than a bounded number are looked at. Times the first workers that have to be tried: two sweeps, where all lines are
alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from azu.models.memory import MAX_JOBS
from azu.planning.snapshot import Demand, Links, Placement, WorkerView, is_range, layer_seconds
from coordinator.planning.lines import Lines, nanoseconds

__all__ = ["Route", "find_route", "stand_in"]

_MOST_SPLITS = 64
_MOST_FIRSTS = 16
_MOST_HOLDERS = 24


@dataclass(frozen=True, slots=True)
class Route:
    """A job's chain.

    Attributes:
        runners_up: for each stage, another worker that could run exactly its layers now, or None.
        seconds: expected for what was demanded, without the time that it waits in line.
    """

    stages: tuple[Placement, ...]
    runners_up: tuple[str | None, ...]
    seconds: float


class _Span(NamedTuple):
    """Layers that a worker may run in a job, by its place among the workers."""

    worker: int
    start: int
    end: int


class _Path(NamedTuple):
    """A way through the layers up to `entry`, from which its last worker goes on; ordered by what it costs."""

    time: int  # until the last worker began; in nanoseconds, so that equal paths are equal
    stages: int
    jobs: int
    span: int
    entry: int
    before: _Path | None

    def walk(self) -> Iterator[_Path]:
        """It and what came before, from the end."""
        path: _Path | None = self
        while path is not None:
            yield path
            path = path.before


def find_route(
    n_layers: int,
    workers: Sequence[WorkerView],
    tokens: int,
    *,
    demand: Demand = Demand(),  # noqa: B008 - frozen
    links: Links | None = None,
    parts: bool = False,
) -> Route | None:
    """The best chain of ready workers with room for one more job of `tokens` positions each, or None.

    Args:
        demand: what is to be quick; by default one token.
        parts: whether workers can run a part of the range that they hold.
    """
    usable = [
        worker
        for worker in sorted(workers, key=lambda worker: worker.peer_id)
        if worker.held and is_range(worker.held, n_layers) and _has_room(worker, tokens)
    ]
    layer_s = layer_seconds(usable, demand)
    links = links or Links()
    quick = _quickest(n_layers, usable, layer_s, links, demand) if parts else usable
    found = _find(n_layers, quick, links, demand, parts=parts)
    if found is None and len(quick) < len(usable):
        found = _find(n_layers, usable, links, demand, parts=parts)
    if found is None:
        return None
    seconds, stages = found
    chosen = {placement.peer_id for placement in stages}
    timed = zip(usable, layer_s, strict=True)
    others = [(worker, seconds) for worker, seconds in timed if worker.peer_id not in chosen]
    runners_up = [_best_for(others, p.start, p.end, parts) for p in stages]
    return Route(stages, tuple(other.peer_id if other else None for other in runners_up), seconds)


def _find(n_layers: int, workers: Sequence[WorkerView], links: Links, demand: Demand, *, parts: bool) -> Found | None:
    search = _Search(n_layers, workers, links, demand)
    spans = [_Span(index, *worker.held) for index, worker in enumerate(workers) if worker.held]
    return search.with_parts(spans) if parts else search.best(spans, parts=False)


def _quickest(
    n_layers: int, workers: Sequence[WorkerView], layer_s: Sequence[float], links: Links, demand: Demand
) -> Sequence[WorkerView]:
    """The workers without those that for none of their layers are among the quickest."""
    if len(workers) <= _MOST_HOLDERS:
        return workers
    holders: list[list[tuple[float, int]]] = [[] for _ in range(n_layers)]
    for index, (worker, seconds) in enumerate(zip(workers, layer_s, strict=True)):
        start, end = worker.held or (0, 0)
        cost = seconds + demand.tokens * links.usual_hop_s(worker) / (end - start)
        for layer in range(start, end):
            holders[layer].append((cost, index))
    kept = {index for those in holders for _, index in heapq.nsmallest(_MOST_HOLDERS, those)}
    return [workers[index] for index in sorted(kept)]


def stand_in(
    workers: Sequence[WorkerView],
    start: int,
    end: int,
    tokens: int,
    *,
    without: Collection[str] = (),
    parts: bool = False,
    away_s: Callable[[WorkerView], float] = lambda _: 0.0,
) -> WorkerView | None:
    """The worker that could best run exactly layers [start, end) of a job now: with the fewest faults, then fastest.

    Args:
        away_s: seconds of a step that it costs beside its layers.
    """
    timed = zip(workers, layer_seconds(workers, Demand()), strict=True)
    able = [(w, layer_s) for w, layer_s in timed if w.peer_id not in without and _has_room(w, tokens)]
    return _best_for(able, start, end, parts, away_s)


def _best_for(
    able: Iterable[tuple[WorkerView, float]],
    start: int,
    end: int,
    parts: bool,
    away_s: Callable[[WorkerView], float] = lambda _: 0.0,
) -> WorkerView | None:
    """Of workers with their seconds per layer, the best for exactly these layers."""
    fitting = [
        (worker.faults, (end - start) * layer_s + away_s(worker), worker.jobs, worker.peer_id, worker)
        for worker, layer_s in able
        if worker.held == (start, end) or (parts and worker.held and worker.held[0] <= start and end <= worker.held[1])
    ]
    return min(fitting, key=lambda each: each[:4])[-1] if fitting else None


def _has_room(worker: WorkerView, tokens: int) -> bool:
    return worker.ready and worker.kv_tokens_free >= tokens and worker.jobs < MAX_JOBS


Found = tuple[float, tuple[Placement, ...]]


_Exit = tuple[int, int, int, _Path]  # a path's costs with a hop: nanoseconds, stages, jobs


class _Exits:
    """The paths that end at one border."""

    def __init__(self, spans: Sequence[_Span], leaving: Sequence[_Path], lines: Lines) -> None:
        self._spans = spans
        self._leaving = leaving
        self._lines = lines
        self._sums: dict[bool, list[_Exit]] = {}  # by whether a relay leads to the next worker, without its end
        self._from: dict[int, list[_Path]] = {}  # by worker
        for path in leaving:
            self._from.setdefault(spans[path.span].worker, []).append(path)

    def best_to(self, place: int, measured: Mapping[int, int]) -> _Exit | None:
        """The cheapest with a hop to a worker, whose lines of these costs were measured; not from itself."""
        best: _Exit | None = None
        for time, stages, jobs, path in self._summed(self._lines.relayed[place]):
            other = self._spans[path.span].worker
            if other != place and other not in measured:
                best = time + self._lines.ends[place], stages, jobs, path
                break
        for other in measured.keys() & self._from.keys():
            for path in self._from[other]:
                found = path.time + measured[other], path.stages + 1, path.jobs, path
                if best is None or found < best:
                    best = found
        return best

    def _summed(self, relayed: bool) -> list[_Exit]:
        if relayed not in self._sums:
            self._sums[relayed] = sorted(
                (path.time + self._lines.ends[other] + self._lines.wires[relayed or self._lines.relayed[other]],
                 path.stages + 1, path.jobs, path)
                for path in self._leaving
                for other in [self._spans[path.span].worker]
            )  # fmt: skip
        return self._sums[relayed]


class _Search:
    """Paths over the layers of one model through workers that have room, in the order of their peer ids."""

    def __init__(self, n_layers: int, workers: Sequence[WorkerView], links: Links, demand: Demand) -> None:
        self._n_layers = n_layers
        self._workers = workers
        self._layer = [nanoseconds(seconds) for seconds in layer_seconds(workers, demand)]
        self._lines = Lines(workers, links, demand)

    def best(self, spans: Sequence[_Span], *, parts: bool) -> Found | None:
        """The best path through these spans, whole ones or parts of them; it may come back to a worker."""
        # Backwards, so that each first worker gets what the way from it takes at least.
        mirrored = [_Span(s.worker, self._n_layers - s.end, self._n_layers - s.start) for s in spans]
        rests = self._sweep(mirrored, None, parts=parts, backwards=True)
        least = sorted(
            (rest.time + self._least_back(spans[rest.span]), rest.stages, rest.jobs, rest.span) for rest in rests
        )
        best: tuple[int, int, int, _Path] | None = None
        for *at_least, span in least[:_MOST_FIRSTS]:
            if best is not None and tuple(at_least) >= best[:3]:
                break
            for path in self._sweep(spans, spans[span].worker, parts=parts, backwards=False):
                total = (self._closed(spans, path), path.stages, path.jobs, path)
                if best is None or total[:3] < best[:3]:
                    best = total
        return (best[0] / 1e9, self._placements(spans, best[3])) if best else None

    def _least_back(self, span: _Span) -> int:
        """What a path at least costs more that begins in a span, as it ends: nothing, if it may need no other stage."""
        return self._lines.least_back(span.worker) if span.end < self._n_layers else 0

    def _sweep(self, spans: Sequence[_Span], first: int | None, *, parts: bool, backwards: bool) -> list[_Path]:
        """The best path to the end of all layers through each last worker, and its costs there.

        Args:
            first: the only worker that paths may begin with.
        """
        entering: list[list[int]] = [[] for _ in range(self._n_layers + 1)]
        for number, span in enumerate(spans):
            for layer in range(span.start, span.end if parts else span.start + 1):
                entering[layer].append(number)
        inside: dict[int, _Path] = {}  # by span, the best path into it
        for border in range(self._n_layers + 1):
            leaving = sorted(
                self._at(spans, path, border) for number, path in inside.items() if spans[number].end == border or parts
            )
            inside = {number: path for number, path in inside.items() if spans[number].end > border}
            exits = _Exits(spans, leaving, self._lines)
            if border == self._n_layers:
                return [path for path in leaving if spans[path.span].end == border]
            for number in entering[border]:
                if border == 0:
                    if first in (None, spans[number].worker):
                        inside[number] = _Path(0, 1, self._workers[spans[number].worker].jobs, number, 0, None)
                    continue
                entered = self._enter(exits, spans[number].worker, number, border, backwards)
                stays = inside.get(number)
                if entered and (stays is None or entered[:3] < self._at(spans, stays, border)[:3]):
                    inside[number] = entered
        return []

    def _at(self, spans: Sequence[_Span], path: _Path, border: int) -> _Path:
        """The path with its last worker's layers up to a border counted."""
        time, stages, jobs, span, entry, before = path
        return _Path(time + (border - entry) * self._layer[spans[span].worker], stages, jobs, span, entry, before)

    def _enter(self, exits: _Exits, place: int, number: int, border: int, backwards: bool) -> _Path | None:
        """The cheapest of the paths that end at a border, with a hop to a worker."""
        best = exits.best_to(place, self._lines.out_of[place] if backwards else self._lines.into[place])
        if best is None:
            return None
        time, stages, jobs, before = best
        return _Path(time, stages, jobs + self._workers[place].jobs, number, border, before)

    def _closed(self, spans: Sequence[_Span], path: _Path) -> int:
        """The path's time with the hop from its last worker to its first."""
        if path.stages == 1:
            return path.time
        *_, first = path.walk()
        return path.time + self._lines.back(spans[path.span].worker, spans[first.span].worker)

    def _placements(self, spans: Sequence[_Span], path: _Path) -> tuple[Placement, ...]:
        stages: list[Placement] = []
        end = self._n_layers
        for each in path.walk():
            stages.append(Placement(self._workers[spans[each.span].worker].peer_id, each.entry, end))
            end = each.entry
        return tuple(stages[::-1])

    def with_parts(self, spans: Sequence[_Span]) -> Found | None:
        """The best path that comes back to no worker."""
        indices = {worker.peer_id: index for index, worker in enumerate(self._workers)}
        first = self.best(spans, parts=True)
        waiting: list[tuple[float, int, Found, Sequence[_Span]]] = [(first[0], 0, first, spans)] if first else []
        for count in range(1, _MOST_SPLITS):
            if not waiting:
                return None
            _, _, found, tried = heapq.heappop(waiting)
            again = _returns(found[1])
            if again is None:
                return found
            for each, smaller in enumerate(_split(tried, indices[again.peer_id], again.end)):
                if (other := self.best(smaller, parts=True)) is not None:
                    heapq.heappush(waiting, (other[0], 3 * count + each, other, smaller))
        return self.best(spans, parts=False)


def _returns(stages: Sequence[Placement]) -> Placement | None:
    """The first stage whose worker comes again later, or None."""
    peers = [stage.peer_id for stage in stages]
    return next((stage for index, stage in enumerate(stages) if stage.peer_id in peers[index + 1 :]), None)


def _split(spans: Sequence[_Span], worker: int, border: int) -> Iterator[list[_Span]]:
    """All ways to use a worker once: before a border, after it, or across it, where nobody else then is."""
    yield [_Span(s.worker, s.start, min(s.end, border)) if s.worker == worker else s for s in spans
           if s.worker != worker or s.start < border]  # fmt: skip
    yield [_Span(s.worker, max(s.start, border), s.end) if s.worker == worker else s for s in spans
           if s.worker != worker or s.end > border]  # fmt: skip
    across: list[_Span] = []
    for span in spans:
        if span.worker != worker:
            before, after = (
                span._replace(end=min(span.end, border - 1)),
                span._replace(start=max(span.start, border + 1)),
            )
            across += [piece for piece in (before, after) if piece.start < piece.end]
        elif span.start < border < span.end:
            across.append(span)
    yield across
