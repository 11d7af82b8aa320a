"""A worker that becomes slow, all of it real: its job moves to another one, the client gets what it would have got,
every position of every layer is paid once, and who was slow has no fault.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from azu.economics import split, token_layers
from coordinator import hedging as hedging_module
from coordinator import mender as mender_module
from coordinator import relief as relief_module
from coordinator import swarm as swarm_module
from coordinator.job import RunningJob
from tests.node.real_stages import TinyModel, prompt_of, tiny_model
from tests.real_swarm import THREE, RealSwarm, Worker, real_swarm

PROMPT, COUNT, SLOW_AT = prompt_of(40), 240, 100
POSITIONS = len(PROMPT) + COUNT - 1
LAG_S = 0.04  # many times what a step takes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def answer(model: TinyModel) -> list[int]:
    return model.greedy(PROMPT, COUNT)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the model is faster than it is elsewhere: a pause too."""
    monkeypatch.setattr(hedging_module, "_PAUSE_S", 0.05)
    monkeypatch.setattr(mender_module, "_GLANCE_S", 0.03)  # several before it is slow
    monkeypatch.setattr(swarm_module, "_POLL_S", 0.2)


async def measured(swarm: RealSwarm) -> RealSwarm:
    """The swarm, once all workers' records tell how fast they are."""
    for worker in swarm.workers:
        loaded = worker.real.jobs.loaded
        assert loaded is not None
        await worker.real.device.run(lambda stage=loaded.stage: stage.measure_pace(64))
        worker.rows.clear()
        worker.tells_speed = True
    while not all(record.speed.prefill_ns for record in swarm.view.workers()):
        await trio.sleep(0.01)
    return swarm


def slow_down(worker: Worker, seconds: float) -> None:
    """From now on each pass of a worker takes so much longer."""
    loaded = worker.real.jobs.loaded
    assert loaded is not None
    encode = loaded.stage._encode

    def late(hidden: object) -> object:
        time.sleep(seconds)
        return encode(hidden)  # type: ignore[arg-type]

    loaded.stage._encode = late  # type: ignore[method-assign,assignment]


async def ask(swarm: RealSwarm, slow_at: int) -> tuple[list[int], RunningJob, Worker]:
    """A job whose middle stage's worker becomes slow after so many tokens: the tokens, the job, and that worker."""
    tokens: list[int] = []
    async with swarm.runner.generate(swarm.request(PROMPT, COUNT)) as job:
        middle = next(each for each in swarm.workers if each.peer_id == job.ticket.stages[1].peer_id)
        async for sampled in job.tokens():
            tokens.append(sampled.token)
            if len(tokens) == slow_at:
                slow_down(middle, LAG_S)
        await job.finish()
    return tokens, job, middle


async def test_a_job_leaves_a_worker_that_has_become_slow_and_all_is_paid_once(
    model: TinyModel, answer: list[int], tmp_path: Path
) -> None:
    async with real_swarm(model, tmp_path, *THREE, (1, 3)) as swarm:
        tokens, job, slow = await ask(await measured(swarm), SLOW_AT)
        assert tokens == answer
        assert job.amendments == 1
        runner_up = next(each for each in swarm.at(1) if each is not slow)
        assert [stage.peer_id for stage in job.ticket.stages] == [
            swarm.at(0)[0].peer_id,
            runner_up.peer_id,
            swarm.at(3)[0].peer_id,
        ]
        # The others ran each position once. The runner-up did so too, or got the cache of those before it.
        assert sum(swarm.at(0)[0].rows) == sum(swarm.at(3)[0].rows) == POSITIONS
        assert POSITIONS - sum(slow.rows) <= sum(runner_up.rows) <= POSITIONS
        assert SLOW_AT < sum(slow.rows) < POSITIONS
        report = await job.finish()
        assert report.held == 0
        assert report.token_layers == token_layers(POSITIONS, 4)
        price = report.cost // report.token_layers
        for start, end in THREE:
            paid = [stage for stage in report.stages if (stage.start, stage.end) == (start, end)]
            assert sum(stage.tokens for stage in paid) == POSITIONS
            assert sum(stage.token_layers for stage in paid) == token_layers(POSITIONS, end - start)
            assert [stage.earned for stage in paid] == [split(stage.token_layers * price).worker for stage in paid]
        paid_by_peer = {stage.peer_id: stage.tokens for stage in report.stages}
        assert paid_by_peer[slow.peer_id] >= len(PROMPT) + SLOW_AT - 1
        assert paid_by_peer[runner_up.peer_id] == POSITIONS - paid_by_peer[slow.peer_id]
        assert sum((await swarm.meter.earnings()).values()) == report.credited
        assert swarm.view.faults(slow.peer_id) == 0
        assert swarm.overlay.statistics().violations == {}


async def test_where_nobody_else_has_the_layers_a_slow_worker_keeps_its_job(
    model: TinyModel, answer: list[int], tmp_path: Path
) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm:
        tokens, job, _ = await ask(await measured(swarm), COUNT - 30)
        assert tokens == answer
        assert job.amendments == 0


async def test_not_all_jobs_leave_a_slow_worker_at_once(
    model: TinyModel, answer: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who has just taken one over, or has just been left, has no part in another move."""
    monkeypatch.setattr(relief_module, "_REST_S", 600.0)
    async with real_swarm(model, tmp_path, *THREE, (1, 3)) as swarm:
        await measured(swarm)
        slowed: list[Worker] = []
        jobs: list[RunningJob] = []

        async def ask_one() -> None:
            async with swarm.runner.generate(swarm.request(PROMPT, COUNT)) as job:
                jobs.append(job)
                tokens = [sampled.token async for sampled in job.tokens()]
                assert tokens == answer

        def slow_later(worker: Worker) -> None:
            if sum(worker.rows) > 3 * POSITIONS // 2 and not slowed:
                slowed.append(worker)
                slow_down(worker, LAG_S / 2)

        for worker in swarm.at(1):
            worker.hook = slow_later
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # two at least at one of the two workers
                nursery.start_soon(ask_one)
        assert slowed
        assert sum(job.amendments for job in jobs) == 1
