"""A swarm of a thousand unequal machines that come and go, simulated: how many tokens it gives, and how late they come.

    python -m benchmarks.swarm_sim --plot docs/swarm-sim.svg

Three ways to place layers and to choose a job's workers:

    random   a random range of as many layers as fit; of those that hold the next layer a random worker, to its end
    Petals   when a worker joins, the range whose layers have the least throughput, as many layers as fit; then the
             path with the least time per token over lines and layers, lines measured, load unknown (arXiv:2312.08361)
    azu      its own planner as it is: place() at each step, find_route() with parts of ranges; of the lines it knows
             what workers' records say, which is those to 16 others for each, and works the rest out from that

Clients ask one thing after the other, and each job reserves KV cache until it ends. Time goes in steps. In one, a
token of a job takes at each worker its layers in a pass with as many others as are there on average (what Little's
law says), half of a pass under way, and the lines of the ring. Lines are a plane's distances and two access delays
with a long tail; one worker in ten is behind a relay. Workers fail and others join, which first load their layers;
the jobs of one that fails pause and go on elsewhere. Prompts take no time here. No swarm can give more than all
workers' speeds together over the number of layers (the bound). Everything follows from the seed. Needs numpy.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from azu.planning import Link, Links, Placement, WorkerView
from azu.records import MAX_LINKS
from benchmarks.machines import LAYERS, large_model, machines
from benchmarks.plot import Line, draw
from benchmarks.swarm_policies import POLICIES, Policy

STEP_S = 5.0
LIFE_S = 7_200.0  # a worker's, on average
FETCH = 100e6  # bytes per second
PAUSE_S = 5.0  # of a job that lost a worker
TOKENS = 30  # of a job, the median
KV_TOKENS = 1_000  # that a job reserves
MOST_JOBS = 16  # that a worker's KV cache holds
SLOWER = 4.0  # than the machines of benchmarks.machines, so that fewer clients fill them
JOB_SHARE = 1.0  # of a pass alone, what each further job adds: nothing is gained by sharing a pass


@dataclass
class Job:
    """A client's job: `workers` by index, with the layers of each; `hops_s` its lines."""

    tokens: float
    began: float
    workers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    layers: np.ndarray = field(default_factory=lambda: np.zeros(0))
    hops_s: float = 0.0
    left: float = 0.0
    ready_at: float = 0.0

    @property
    def runs(self) -> bool:
        return len(self.workers) > 0


@dataclass(frozen=True)
class Outcome:
    """What came of a run; times in seconds for each token, waiting included."""

    rate: float
    bound: float
    median: float
    late: float
    stages: float


class Swarm:
    """The machines, their lines, and the clients of one run."""

    def __init__(self, policy: Policy, count: int, clients: int, seed: int) -> None:
        self.shape = large_model()
        self.policy = policy
        self._chance = random.Random(seed)
        self._joined = count
        self.workers = [self._slower(worker) for worker in machines(count, seed)]
        self.places = [self._place() for _ in self.workers]
        self.hops = np.zeros((count, count))
        self._measured: list[list[int]] = [[] for _ in range(count)]  # the others whose lines each worker measured
        self._connect(range(count))
        self.ready_at = [0.0] * count
        self.jobs = [Job(0.0, 0.0) for _ in range(clients)]
        self.crowd = np.zeros(count)  # how many jobs are at each worker, on average
        self.now = 0.0
        self.done: list[tuple[float, float, int]] = []  # tokens, seconds, stages of finished jobs
        self._hold(policy.place(self, self._chance))
        self.workers = [replace(worker, ready=worker.held is not None) for worker in self.workers]
        for job in self.jobs:
            self._begin(job)

    def _slower(self, worker: WorkerView) -> WorkerView:
        seconds = SLOWER * worker.decode_s
        relayed = self._chance.random() < 0.1
        return replace(worker, decode_s=seconds, decode_job_s=JOB_SHARE * seconds, relayed=relayed)

    def _place(self) -> tuple[float, float, float]:
        """Where a machine is, in seconds from two edges, and its access delay."""
        return self._chance.uniform(0, 0.04), self._chance.uniform(0, 0.02), 0.003 * self._chance.paretovariate(1.3)

    def _connect(self, numbers: Sequence[int]) -> None:
        """Work out the lines of these machines."""
        x, y, delay = np.array(self.places).T
        relayed = np.array([worker.relayed for worker in self.workers])
        delay = np.minimum(delay, 0.5)
        for one in numbers:
            line = np.hypot(x - x[one], y - y[one]) + delay + delay[one] + 0.05 * (relayed | relayed[one])
            self.hops[one], self.hops[:, one] = line, line
            self._measured[one] = self._chance.sample(
                [n for n in range(len(x)) if n != one], min(MAX_LINKS, len(x) - 1)
            )
        names = [worker.peer_id for worker in self.workers]
        self.links = Links(
            {
                (names[one], names[other]): Link(2 * float(self.hops[one, other]), math.inf)
                for one, others in enumerate(self._measured)
                for other in others
            },
            hop_bytes=0,
        )

    def _hold(self, plan: Sequence[Placement]) -> None:
        index = {worker.peer_id: number for number, worker in enumerate(self.workers)}
        for given in plan:
            number = index[given.peer_id]
            worker = replace(self.workers[number], held=(given.start, given.end), ready=False)
            self.workers[number] = worker
            self.ready_at[number] = self.now + self.shape.stage_bytes(given.start, given.end) / FETCH

    def _begin(self, job: Job) -> None:
        job.tokens = job.left = max(5.0, TOKENS * self._chance.lognormvariate(0, 0.6))
        job.began = self.now
        self._route(job)

    def _route(self, job: Job) -> None:
        chain = self.policy.route(self, KV_TOKENS, self._chance)
        if chain is None:
            return
        job.workers = np.array([number for number, _ in chain])
        job.layers = np.array([float(layers) for _, layers in chain])
        ring = [*job.workers, job.workers[0]] if len(chain) > 1 else []
        job.hops_s = sum(float(self.hops[one, other]) for one, other in pairwise(ring))
        self._count(job, 1)

    def _count(self, job: Job, jobs: int) -> None:
        for number in job.workers:
            worker = self.workers[number]
            room = worker.kv_tokens_free - jobs * KV_TOKENS
            self.workers[number] = replace(worker, jobs=worker.jobs + jobs, kv_tokens_free=room)

    def step(self) -> None:
        """Let so much time pass."""
        self._churn()
        for job in self.jobs:
            if not job.runs:
                self._route(job)
        running = [job for job in self.jobs if job.runs]
        if running:
            self._compute(running)
        self.now += STEP_S
        self._hold(self.policy.place(self, self._chance))
        for number, worker in enumerate(self.workers):
            if worker.held and not worker.ready and self.now >= self.ready_at[number]:
                self.workers[number] = replace(worker, ready=True)

    def _compute(self, running: Sequence[Job]) -> None:
        at = np.concatenate([job.workers for job in running])
        layers = np.concatenate([job.layers for job in running])
        owner = np.repeat(np.arange(len(running)), [len(job.workers) for job in running])
        alone = np.array([worker.decode_s for worker in self.workers])
        more = np.array([worker.decode_job_s for worker in self.workers])
        hops = np.array([job.hops_s for job in running])
        visits = np.maximum(np.bincount(at, minlength=len(alone)), 1)
        usual = np.bincount(at, layers, len(alone)) / visits
        token = hops
        for _ in range(4):
            crowd = self.crowd[at]
            seconds = layers * (alone[at] + more[at] * crowd) + 0.5 * np.minimum(crowd, 1) * usual[at] * alone[at]
            token = np.bincount(owner, seconds, len(running)) + hops
            self.crowd = 0.5 * self.crowd + 0.5 * np.bincount(at, seconds / token[owner], len(alone))
        for job, each in zip(running, token, strict=True):
            passed = max(0.0, min(STEP_S, self.now + STEP_S - job.ready_at))
            job.left -= passed / float(each)
            if job.left <= 0:
                late = job.left * float(each)  # it ended within the step
                self.done.append((job.tokens, self.now + STEP_S + late - job.began, len(job.workers)))
                self._end(job)
                self._begin(job)

    def _end(self, job: Job) -> None:
        self._count(job, -1)
        job.workers = np.zeros(0, dtype=int)

    def _churn(self) -> None:
        gone = [number for number in range(len(self.workers)) if self._chance.random() < STEP_S / LIFE_S]
        for number in gone:
            for job in self.jobs:
                if job.runs and number in job.workers:
                    self._end(job)
                    job.ready_at = self.now + PAUSE_S
            self._joined += 1
            newcomer = self._slower(machines(1, 10_000 + self._joined)[0])
            self.workers[number] = replace(newcomer, peer_id=f"peer{self._joined:04}")
            self.places[number] = self._place()
            self.crowd[number] = 0.0
        if gone:
            self._connect(gone)

    def bound(self) -> float:
        """Tokens per second if all workers were busy with as many jobs as they hold."""
        passes = (worker.decode_s + (MOST_JOBS - 1) * worker.decode_job_s for worker in self.workers)
        return sum(MOST_JOBS / each for each in passes) / LAYERS


def run(policy: Policy, count: int, clients: int, seconds: float, seed: int) -> Outcome:
    """One run; its first third does not count."""
    swarm = Swarm(policy, count, clients, seed)
    while swarm.now < seconds / 3:
        swarm.step()
    swarm.done.clear()
    before = sum(job.tokens - job.left for job in swarm.jobs)
    started = swarm.now
    while swarm.now < seconds:
        swarm.step()
    assert swarm.done, "no job ended: simulate more seconds"
    tokens = sum(each[0] for each in swarm.done) + sum(job.tokens - job.left for job in swarm.jobs) - before
    late = sorted(each[1] / each[0] for each in swarm.done)
    return Outcome(
        tokens / (swarm.now - started),
        swarm.bound(),
        late[len(late) // 2],
        late[int(len(late) * 0.99)],
        sum(each[2] for each in swarm.done) / len(swarm.done),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--clients", default="100,250,500")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each run, simulated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    options = parser.parse_args()
    loads = [int(each) for each in options.clients.split(",")]
    lines = {name: Line(name) for name in POLICIES}
    bound = 0.0
    print("| | clients | tokens/s | of the bound | s per token, median | 99th percentile | stages |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for clients in loads:
        for name, policy in POLICIES.items():
            found = run(policy, options.workers, clients, options.seconds, options.seed)
            bound = found.bound
            lines[name].points.append((clients, found.rate))
            print(
                f"| {name} | {clients} | {found.rate:.0f} | {found.rate / bound:.2f} | {found.median:.2f} "
                f"| {found.late:.2f} | {found.stages:.1f} |",
                flush=True,
            )
    if options.plot:
        best = max(rate for line in lines.values() for _, rate in line.points)
        if bound < 3 * best:  # else all other lines would lie on the ground
            lines["bound"] = Line("bound", [(clients, bound) for clients in loads], dashed=True)
        draw(options.plot, list(lines.values()), "clients", "tokens per second")


if __name__ == "__main__":
    main()
