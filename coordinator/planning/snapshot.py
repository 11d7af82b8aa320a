"""The swarm at one moment, as the planner sees it: workers, lines between them, and a model. Values only.

What was not measured has a stated default: a worker without measurements counts as the median of those that have some,
a line without them as `DIRECT` or, where an end can be reached through a relay only, as `RELAYED`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

__all__ = [
    "DIRECT",
    "RELAYED",
    "Link",
    "Links",
    "ModelShape",
    "Placement",
    "Range",
    "WorkerView",
    "is_range",
    "layered",
    "layer_seconds",
    "speeds",
]

Range = tuple[int, int]

# What a further job adds to a pass, as a share of a pass with one job, where that was not measured: on a CPU, 16 jobs
# share a pass that takes 3.2 times as long (docs/performance.md).
BATCH_SHARE = 0.15
# Placement looks at passes of so many jobs, since throughput matters when there are many.
PLANNED_JOBS = 8
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
    `decode_s + (b - 1) * decode_job_s` for each layer. Workers that hold layers of another model are not passed in.
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
    faults: int = 0
    relayed: bool = False

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
class Link:
    """A line from one worker to another: round trip in seconds, bandwidth in bytes per second."""

    rtt_s: float
    bandwidth: float

    def hop_s(self, size: int) -> float:
        """Seconds until `size` bytes have arrived."""
        return self.rtt_s / 2 + size / self.bandwidth


DIRECT = Link(rtt_s=0.05, bandwidth=12.5e6)
RELAYED = Link(rtt_s=0.15, bandwidth=2.5e6)


@dataclass(frozen=True, slots=True)
class Links:
    """All lines; `measured` by (from, to), `hop_bytes` what a token's activations take on one."""

    measured: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    hop_bytes: int = 8_192
    direct: Link = DIRECT
    relayed: Link = RELAYED

    def hop_s(self, one: WorkerView, other: WorkerView) -> float:
        """Seconds that a token's activations take from one worker to another."""
        link = self.measured.get((one.peer_id, other.peer_id)) if self.measured else None
        if link is None:
            link = self.relayed if one.relayed or other.relayed else self.direct
        return link.hop_s(self.hop_bytes)

    def least_s(self) -> float:
        """No hop takes less."""
        links = (self.direct, self.relayed, *self.measured.values())
        return min(link.hop_s(self.hop_bytes) for link in links)


def is_range(range_: Range, n_layers: int) -> bool:
    """Whether these are layers of the model at all; a worker's record could claim anything."""
    return 0 <= range_[0] < range_[1] <= n_layers


def _typical(workers: Sequence[WorkerView]) -> float:
    return statistics.median([worker.decode_s for worker in workers if worker.decode_s > 0] or [0.0])


def _pass_s(worker: WorkerView, typical: float, jobs: int) -> float:
    alone = worker.decode_s or typical
    return alone + (jobs - 1) * (worker.decode_job_s or BATCH_SHARE * alone)


def layer_seconds(workers: Sequence[WorkerView]) -> list[float]:
    """For each worker, the seconds of a layer in a pass with the jobs that it has and one more; 0 if none measured."""
    typical = _typical(workers)
    return [_pass_s(worker, typical, worker.jobs + 1) for worker in workers]


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
