"""The swarm at one moment, as the planner sees it: workers, lines between them, and a model. Values only.

What was not measured has a stated default: a worker without measurements counts as the median of those that have some,
a line without them as `DIRECT` or, where an end can be reached through a relay only, as `RELAYED`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

__all__ = [
    "DIRECT",
    "RELAYED",
    "Demand",
    "Link",
    "Links",
    "ModelShape",
    "Placement",
    "Power",
    "Range",
    "WorkerView",
    "is_range",
    "layered",
    "layer_seconds",
    "powers",
    "speeds",
]

Range = tuple[int, int]

# What a further job adds to a pass, as a share of a pass with one job, where that was not measured: on a CPU, 16 jobs
# share a pass that takes 3.2 times as long (docs/performance.md).
BATCH_SHARE = 0.15
# Placement looks at passes of so many jobs, since throughput matters when there are many. The fewer, the more a hop
# costs; 4 were tried in the simulated swarm too (docs/performance.md).
PLANNED_JOBS = 16
# Where no speed was measured, a hop counts as so many layers of one pass.
UNMEASURED_HOP = 3.0
# A measurement is a claim. No worker counts as so many times faster or slower than the median: else one that lies
# about its speed would keep its stage without replicas.
MOST_APART = 16.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the planner knows of a model.

    `stage_bytes(start, end)` is a stage's memory with its KV cache, embeddings and head counted, in bytes.
    """

    n_layers: int
    stage_bytes: Callable[[int, int], int]


def layered(
    layers: Sequence[int], *, embedding: int = 0, head: int = 0, kv_bytes: int = 0, kv_tokens: int = 0
) -> ModelShape:
    """A model by the bytes of each layer; every layer keeps `kv_bytes` for each of `kv_tokens` positions."""
    upto = [0, *accumulate(size + kv_bytes * kv_tokens for size in layers)]

    def stage_bytes(start: int, end: int) -> int:
        return upto[end] - upto[start] + embedding * (start == 0) + head * (end == len(layers))

    return ModelShape(len(layers), stage_bytes)


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the planner knows of a worker, for one model. Memory in bytes, times in seconds; 0 is not measured.

    `held` is the range that it has loaded or is loading, `ready` whether it can run it; `cached` what lies on its disk.
    `network` is an opaque group, whose members may fail together; "" is a group of its own. A pass of b jobs takes
    `decode_s + (b - 1) * decode_job_s` for each layer, a prompt's position `prefill_s`. Who `is_fixed` is given no
    other layers than it holds. Workers that hold layers of another model are not passed in.
    """

    peer_id: str
    vram: int
    held: Range | None = None
    ready: bool = False
    cached: tuple[Range, ...] = ()
    jobs: int = 0
    kv_tokens_free: int = 0
    network: str = ""
    decode_s: float = 0.0
    decode_job_s: float = 0.0
    prefill_s: float = 0.0
    faults: int = 0
    relayed: bool = False
    is_fixed: bool = False

    def has_cached(self, range_: Range) -> bool:
        """Whether all of a range lies on its disk."""
        return any(start <= range_[0] and range_[1] <= end for start, end in self.cached)


@dataclass(frozen=True, slots=True)
class Placement:
    """Layers [start, end) at a worker: to load, or to run a job through."""

    peer_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job asks of a chain: `prompt` positions of a prompt, and then so many `tokens`, each a trip round."""

    prompt: int = 0
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class Link:
    """A line from one worker to another: round trip in seconds, bandwidth in bytes per second."""

    rtt_s: float
    bandwidth: float

    def hop_s(self, size: int) -> float:
        """Seconds until `size` bytes have arrived."""
        return self.rtt_s / 2 + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class Power:
    """What a worker gives: `speed` in layers per second, many jobs at once, and `away_s`, what a stage costs beside its
    layers. A worker has PLANNED_JOBS jobs at a time, and while a token of one is on its way to the next stage, it has
    one job less to compute for: so that is a hop's seconds over the number of jobs.
    """

    speed: float
    away_s: float

    def rate(self, layers: int, n_layers: int) -> float:
        """Tokens per second through a stage of so many layers; one with all of the model has nowhere to send them."""
        return 1 / (layers / self.speed + (self.away_s if layers < n_layers else 0.0))

    def most_layers(self, rate: float) -> int:
        """How many layers a stage may have, in a chain of several, to be no slower than `rate`."""
        return max(0, int(self.speed * (1 / rate - self.away_s) + 1e-9))


DIRECT = Link(rtt_s=0.05, bandwidth=12.5e6)
RELAYED = Link(rtt_s=0.15, bandwidth=2.5e6)


@dataclass(frozen=True)
class Links:
    """All lines; `measured` by (from, to), `hop_bytes` what a token's activations take on one.

    A line that was not measured is taken as the sum of what its ends are away from everything: a worker's usual round
    trip, as it measured that itself, without its half of everybody's usual one. What others say of it counts only where
    it says nothing, so that nobody can make another look far away.
    """

    measured: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    hop_bytes: int = 8_192
    direct: Link = DIRECT
    relayed: Link = RELAYED

    @cached_property
    def _usual(self) -> dict[str, float]:
        """Workers' usual round trips, of those that are known."""
        told: dict[str, list[float]] = {}
        heard: dict[str, list[float]] = {}
        for (one, other), link in self.measured.items():
            told.setdefault(one, []).append(link.rtt_s)
            heard.setdefault(other, []).append(link.rtt_s)
        return {peer_id: statistics.median(rtts) for peer_id, rtts in (heard | told).items()}

    @cached_property
    def _typical(self) -> float:
        return statistics.median(self._usual.values()) if self._usual else self.direct.rtt_s

    def away_s(self, worker: WorkerView) -> float:
        """A worker's part of a round trip that was not measured, in seconds."""
        usual = self._usual.get(worker.peer_id)
        if usual is not None:
            return max(0.0, usual - self._typical / 2)
        return self.relayed.rtt_s - self.direct.rtt_s / 2 if worker.relayed else self.direct.rtt_s / 2

    def link(self, one: WorkerView, other: WorkerView) -> Link:
        """The line from one worker to another."""
        link = self.measured.get((one.peer_id, other.peer_id))
        if link is not None:
            return link
        bandwidth = (self.relayed if one.relayed or other.relayed else self.direct).bandwidth
        return Link(self.away_s(one) + self.away_s(other), bandwidth)

    def hop_s(self, one: WorkerView, other: WorkerView, positions: int = 1) -> float:
        """Seconds that the activations of so many positions take from one worker to another."""
        return self.link(one, other).hop_s(positions * self.hop_bytes)

    def usual_hop_s(self, worker: WorkerView) -> float:
        """Seconds that a token's activations usually take from a worker."""
        bandwidth = (self.relayed if worker.relayed else self.direct).bandwidth
        return Link(self.away_s(worker) + self._typical / 2, bandwidth).hop_s(self.hop_bytes)


def is_range(range_: Range, n_layers: int) -> bool:
    """Whether these are layers of the model at all; a worker's record could claim anything."""
    return 0 <= range_[0] < range_[1] <= n_layers


def _typical(workers: Sequence[WorkerView]) -> float:
    return _middle(worker.decode_s for worker in workers)


def _middle(seconds: Iterable[float]) -> float:
    """The median of those that were measured."""
    return statistics.median([each for each in seconds if each > 0] or [0.0])


def _pass_s(worker: WorkerView, typical: float, jobs: int) -> float:
    alone = worker.decode_s or typical
    return alone + (jobs - 1) * (worker.decode_job_s or BATCH_SHARE * alone)


def layer_seconds(workers: Sequence[WorkerView], demand: Demand) -> list[float]:
    """For each worker, the seconds of a layer for a job, in passes with its other jobs; 0 if none was measured."""
    typical, usual = _typical(workers), _middle(worker.prefill_s for worker in workers)
    return [
        demand.tokens * _pass_s(worker, typical, worker.jobs + 1) + demand.prompt * (worker.prefill_s or usual)
        for worker in workers
    ]


def speeds(workers: Sequence[WorkerView]) -> dict[str, float]:
    """By peer id, how many layers a worker runs a job through in a second, many jobs at once; all 1 if none measured.

    The fewer layers a worker holds, the more tokens it has for each: its speed over its number of layers.
    """
    typical = _typical(workers)
    if not typical:
        return {worker.peer_id: 1.0 for worker in workers}
    found = {worker.peer_id: PLANNED_JOBS / _pass_s(worker, typical, PLANNED_JOBS) for worker in workers}
    middle = statistics.median(found.values())
    return {peer: min(max(speed, middle / MOST_APART), middle * MOST_APART) for peer, speed in found.items()}


def powers(workers: Sequence[WorkerView], links: Links) -> dict[str, Power]:
    """By peer id, what workers give as stages."""
    speed = speeds(workers)
    if not _typical(workers):
        return {peer_id: Power(each, UNMEASURED_HOP) for peer_id, each in speed.items()}
    return {w.peer_id: Power(speed[w.peer_id], links.usual_hop_s(w) / PLANNED_JOBS) for w in workers}
