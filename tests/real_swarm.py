"""A coordinator's job runner over real stages of a tiny model, on loopback: workers that can be killed at a chosen
step, and counts of what each computed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import outcome
import trio

from azu.channel import Channel
from azu.ledger import Ledger
from azu.overlay import Overlay, OverlayStream
from azu.records import WorkerRecord, sign_worker_record
from azu.tickets import Sampling
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, Status
from coordinator.generation import GenerationRequest, ServedModel
from coordinator.job import RunningJob
from coordinator.jobs import JobRunner
from coordinator.meter import Meter
from coordinator.swarm import SwarmView
from node.engine.stage import Step
from node.links import keep_pinging
from tests.forwarders import Forwarders
from tests.node.real_stages import LIMIT, Stage, TinyModel, identity, peer, real_stage

COORDINATOR = 99

Results = list[outcome.Outcome[Any]]
NO_LINES: Mapping[int, Forwarders] = MappingProxyType({})


# A model of four layers in three stages, and where these begin.
THREE = ((0, 1), (1, 3), (3, 4))
STARTS = (0, 1, 3)
DRAWN = Sampling(
    temperature=1.0, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3, seed=7
)


@dataclass
class Worker:
    """A real stage that can be killed, and the rows that it ran of each pass's jobs, in order."""

    model: TinyModel
    number: int
    start: int
    end: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    rows: list[int] = field(default_factory=list)
    prefill_ns: int = 0  # that it claims
    tells_speed: bool = False  # and how far others are; else all are taken for equally fast
    dies_after: int | None = None  # steps, the last of which is computed but never sent on
    hook: Callable[[Worker], None] = lambda worker: None  # on the device thread, after each step
    stage: Stage | None = None

    @property
    def peer_id(self) -> str:
        return identity(self.number).peer_id

    @property
    def real(self) -> Stage:
        assert self.stage is not None
        return self.stage

    def kill(self) -> None:
        self.scope.cancel()

    async def leave(self) -> None:
        """Leave properly, as soon as no job runs here any more."""
        self.real.jobs.leave()
        await self.real.jobs.until_served()
        self.kill()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with real_stage(self.model, self.number, self.start, self.end) as self.stage:
                self.stage.overlay.handle(CONTROL_PROTOCOL, self._control)
                self._count()
                task_status.started()
                await keep_pinging(self.stage.overlay, self.stage.jobs.meter.links)

    def _count(self) -> None:
        """Count, and die on time: the kill is there before the step's result."""
        loaded, token = self.real.jobs.loaded, trio.lowlevel.current_trio_token()
        assert loaded is not None
        run_steps = loaded.stage.run_steps

        def counted(steps: Sequence[Step]) -> Results:
            results = run_steps(steps)
            self.rows += [step.rows for step in steps]
            if self.dies_after is not None and len(self.rows) >= self.dies_after:
                token.run_sync_soon(self.kill)
            self.hook(self)
            return results

        loaded.stage.run_steps = counted  # type: ignore[method-assign]

    async def _control(self, stream: OverlayStream) -> None:
        channel = Channel(stream, CONTROL)
        while await channel.receive() is not None:
            await channel.send(Status(), self._record())

    def _record(self) -> bytes:
        now, jobs, manifest = int(time.time()), self.real.jobs, self.model.manifest.digest
        fields: dict[str, Any] = {
            "peer_id": self.peer_id, "sequence": time.time_ns(), "issued_at": now, "expires_at": now + 60,
            "agent": "test", "protocols": (), "addrs": (), "device": "test", "dtype": "float32", "vram_total": 1,
            "vram_free": 0, "kv_tokens": jobs.kv.tokens, "kv_tokens_free": jobs.kv.room,
            "jobs": jobs.count, "layer_us": 10, "payout_address": "", "leaving": jobs.is_leaving,
            "speed": {"prefill_ns": self.prefill_ns},
            "ranges": [{"manifest": manifest, "start": self.start, "end": self.end, "state": "loaded"}],
        }  # fmt: skip
        if self.tells_speed and jobs.loaded is not None:
            fields["speed"] = jobs.loaded.stage.pace.speed()
            fields["links"] = jobs.meter.links.told(trio.current_time())
        return sign_worker_record(self.real.identity, WorkerRecord.model_validate(fields))


@dataclass
class RealSwarm:
    """Workers by number, and the coordinator's parts."""

    model: TinyModel
    overlay: Overlay
    view: SwarmView
    runner: JobRunner
    nursery: trio.Nursery
    meter: Meter
    workers: list[Worker] = field(default_factory=list)
    token: trio.lowlevel.TrioToken = field(default_factory=trio.lowlevel.current_trio_token)

    def soon(self, call: Callable[[], object]) -> None:
        """Call on the event loop, from any thread; ahead of what that thread sends there later."""
        self.token.run_sync_soon(call)

    async def add(self, start: int, end: int) -> None:
        """Let a worker join, known to everybody."""
        await self.join(start, end)
        await self.until_known()

    async def until_known(self) -> None:
        """Wait until the coordinator has every living worker's record."""
        living = {worker.peer_id for worker in self.workers if not worker.scope.cancel_called}
        while not living <= {record.peer_id for record in self.view.workers()}:
            await trio.sleep(0.01)

    async def until_idle(self) -> None:
        """Wait until the coordinator has read that no worker runs a job: the next one takes the same chain."""
        while any(record.jobs for record in self.view.workers()):
            await trio.sleep(0.01)

    async def join(self, start: int, end: int, lines: Mapping[int, Forwarders] = NO_LINES) -> None:
        """Let a worker join, known to its peers.

        Args:
            lines: to workers of these numbers.
        """
        worker = Worker(self.model, len(self.workers) + 1, start, end)
        await self.nursery.start(worker.run)
        addrs = worker.real.overlay.addrs
        await self.overlay.connect(worker.peer_id, addrs)
        for other in (each for each in self.workers if not each.scope.cancel_called):
            line = lines.get(other.number)
            await other.real.overlay.connect(worker.peer_id, addrs if line is None else [through(line, addrs[0])])
        self.workers.append(worker)
        self.view._meet(worker.peer_id)

    def request(self, prompt: Sequence[int], count: int, sampling: Sampling | None = None) -> GenerationRequest:
        model = ServedModel(manifest=self.model.manifest, tokenizer_files={}, config={}, created=0)
        return GenerationRequest(model, tuple(prompt), count, sampling or Sampling(), ())

    async def ask(
        self, prompt: Sequence[int], count: int, sampling: Sampling | None = None
    ) -> tuple[list[int], RunningJob]:
        """The tokens of a job, and the job after its end."""
        async with self.runner.generate(self.request(prompt, count, sampling)) as job:
            tokens = [sampled.token async for sampled in job.tokens()]
            await job.finish()
        return tokens, job

    def at(self, start: int) -> list[Worker]:
        """The workers that hold the layers from `start` on."""
        return [worker for worker in self.workers if worker.start == start]


def pair(swarm: RealSwarm, start: int) -> tuple[Worker, Worker]:
    """Who runs jobs from layer `start` on, and who takes them over."""
    first, second = sorted(swarm.at(start), key=lambda worker: worker.peer_id)
    return first, second


def through(line: Forwarders, address: str) -> str:
    """A multiaddr that leads to this one on a line."""
    parts = address.split("/")
    parts[4] = str(line.to(int(parts[4])))
    return "/".join(parts)


@asynccontextmanager
async def real_swarm(model: TinyModel, folder: Path, *ranges: tuple[int, int]) -> AsyncIterator[RealSwarm]:
    """A worker for each range. Of those with the same one, the first runs jobs, the others are its substitutes."""
    with trio.fail_after(LIMIT):
        async with (
            peer(COORDINATOR) as me,
            Ledger.open(folder / "ledger.sqlite3", currency="units") as ledger,
            trio.open_nursery() as nursery,
        ):
            view, meter = SwarmView(me), Meter(ledger)
            runner = JobRunner(identity(COORDINATOR), me, view, meter, price=2)
            swarm = RealSwarm(model, me, view, runner, nursery, meter)
            for start, end in ranges:
                await swarm.join(start, end)
            nursery.start_soon(view.run)
            await swarm.until_known()
            yield swarm
            nursery.cancel_scope.cancel()
