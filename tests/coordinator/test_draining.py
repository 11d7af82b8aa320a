"""Workers that leave while they run a job, all of it real: the client notices nothing, nobody gets a fault for it, and
everybody is paid for what they did.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from azu.economics import split
from azu.errors import NetworkError
from coordinator import mender as mender_module
from coordinator.generation import JobReport
from coordinator.job import RunningJob
from tests.node.real_stages import TinyModel, prompt_of, tiny_model
from tests.real_swarm import DRAWN, STARTS, THREE, RealSwarm, Worker, pair, real_swarm

PROMPT, COUNT = prompt_of(600), 120
CHUNKS = 3  # of the prompt
POSITIONS = len(PROMPT) + COUNT - 1  # that go through every layer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def jobs_are_moved_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mender_module, "_ENDS_S", 0.0)


def leaves_after(swarm: RealSwarm, steps: int, trigger: Worker, *leavers: Worker) -> None:
    """Let workers leave when one of them has run so many steps."""

    def look(worker: Worker) -> None:
        if len(worker.rows) == steps:
            for leaver in leavers:
                swarm.soon(partial(swarm.nursery.start_soon, leaver.leave))

    trigger.hook = look


def assert_paid(report: JobReport, model: TinyModel) -> None:
    """Everybody is, and each position of each layer once."""
    assert {stage.state for stage in report.stages} == {"credited"}
    assert sum(stage.token_layers for stage in report.stages) == report.token_layers
    price = report.cost // report.token_layers
    assert report.credited == sum(split(stage.token_layers * price).worker for stage in report.stages)
    for layer in range(4):
        assert sum(stage.tokens for stage in report.stages if stage.start <= layer < stage.end) == POSITIONS


def assert_no_faults(swarm: RealSwarm) -> None:
    assert not any(swarm.view.faults(worker.peer_id) for worker in swarm.workers)
    for overlay in (swarm.overlay, *(w.real.overlay for w in swarm.workers if not w.scope.cancel_called)):
        assert overlay.statistics().violations == {}


@pytest.mark.parametrize("steps", [2, CHUNKS + 8], ids=["in-prefill", "in-decode"])
@pytest.mark.parametrize("left", [{0}, {1}, {3}, {0, 3}, {0, 1, 3}], ids=lambda left: "-".join(map(str, left)))
async def test_a_job_moves_to_others(model: TinyModel, tmp_path: Path, left: set[int], steps: int) -> None:
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        leavers = [pair(swarm, start)[0] for start in left]
        leaves_after(swarm, steps, leavers[-1], *leavers)
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments >= 1
        for leaver in leavers:  # it ends by itself, and the job went on without it
            while not leaver.scope.cancel_called:
                await trio.sleep(0.01)
        report = await job.finish()
        assert {stage.peer_id for stage in report.stages[:3]} == {
            pair(swarm, start)[start in left].peer_id for start in STARTS
        }
        assert_paid(report, model)
        if steps > CHUNKS:
            assert {stage.peer_id for stage in report.stages[3:]} == {leaver.peer_id for leaver in leavers}
            earned = await swarm.meter.earnings()
            assert all(earned[leaver.peer_id] > 0 for leaver in leavers)
        assert_no_faults(swarm)


async def test_two_in_a_row_take_a_stage_over(model: TinyModel, tmp_path: Path) -> None:
    """Where nobody else has all of its layers; and then one of the two leaves as well."""
    async with real_swarm(model, tmp_path, *THREE, (1, 2), (2, 3), (2, 3)) as swarm:
        first, whole, last, *halves = swarm.workers
        for half in halves:
            swarm.view.blame(half.peer_id, 1, NetworkError("so that the job begins with the one that has both layers"))
        leaves_after(swarm, CHUNKS + 8, whole, whole)
        one, two = pair(swarm, 2)
        leaves_after(swarm, CHUNKS + 8, one, one)
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        report = await job.finish()
        now = [first.peer_id, halves[0].peer_id, two.peer_id, last.peer_id]
        assert [stage.peer_id for stage in report.stages] == [*now, whole.peer_id, one.peer_id]
        assert_paid(report, model)
        assert [sorted(each.words) for each in job._crew.handovers] == [[0, 2], [0, 1, 3]]  # by their index until then
        assert sum(first.rows) == sum(last.rows) == POSITIONS


async def test_the_others_run_nothing_twice(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        (first, _), (middle, heir), (last, _) = (pair(swarm, start) for start in STARTS)
        leaves_after(swarm, CHUNKS + 8, middle, middle)
        tokens, _ = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert [sum(worker.rows) for worker in (first, heir, last)] == [POSITIONS] * 3
        assert sum(middle.rows) < POSITIONS


async def test_sampling_goes_on_with_the_same_random_numbers_and_penalties(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        undisturbed, _ = await swarm.ask(PROMPT, COUNT, DRAWN)
        await swarm.until_idle()
        last = pair(swarm, 3)[0]
        leaves_after(swarm, len(last.rows) + CHUNKS + 8, last, last)
        tokens, job = await swarm.ask(PROMPT, COUNT, DRAWN)
        assert job.amendments >= 1
        assert tokens == undisturbed
        assert tokens != model.greedy(PROMPT, COUNT)


@pytest.mark.parametrize("left", [{0}, {1}, {3}, {0, 1, 3}], ids=lambda left: "-".join(map(str, left)))
async def test_a_cache_is_handed_over_where_that_is_faster(model: TinyModel, tmp_path: Path, left: set[int]) -> None:
    """The heir then computes only what came after it, and the stage before it sends no more than that again."""
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        for worker in swarm.workers:
            worker.prefill_ns = 10**9
        await _until_told(swarm)
        leavers = [pair(swarm, start)[0] for start in left]
        leaves_after(swarm, CHUNKS + 8, leavers[-1], *leavers)
        tokens, job = await swarm.ask(PROMPT, 400)
        assert tokens == model.greedy(PROMPT, 400)
        assert job.amendments >= 1
        for start in left:
            first, heir = pair(swarm, start)
            assert 0 < sum(heir.rows) < 400
            assert sum(first.rows) + sum(heir.rows) <= len(PROMPT) + 400 + 8  # a step may be on its way
        report = await job.finish()
        assert {stage.state for stage in report.stages} == {"credited"}
        assert sum(stage.token_layers for stage in report.stages) == report.token_layers
        assert_no_faults(swarm)


async def test_the_cache_of_a_stage_that_samples_goes_on_with_the_same_random_numbers(
    model: TinyModel, tmp_path: Path
) -> None:
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        undisturbed, _ = await swarm.ask(PROMPT, 400, DRAWN)
        for worker in swarm.workers:
            worker.prefill_ns = 10**9
        await swarm.until_idle()
        await _until_told(swarm)
        last, heir = pair(swarm, 3)
        leaves_after(swarm, len(last.rows) + CHUNKS + 8, last, last)
        tokens, _ = await swarm.ask(PROMPT, 400, DRAWN)
        assert tokens == undisturbed
        assert 0 < sum(heir.rows) < 400


async def test_an_heir_that_dies_on_the_way_costs_the_client_nothing(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE, (1, 3), (1, 3)) as swarm:
        for worker in swarm.workers:
            worker.prefill_ns = 10**9
        await _until_told(swarm)
        workers = sorted(swarm.at(1), key=lambda worker: worker.peer_id)
        workers[1].dies_after = 1  # with the pass by which it finds its cache's form
        leaves_after(swarm, CHUNKS + 8, workers[0], workers[0])
        tokens, job = await swarm.ask(PROMPT, 400)
        assert tokens == model.greedy(PROMPT, 400)
        assert job.ticket.stages[1].peer_id == workers[2].peer_id
        assert not swarm.view.faults(workers[0].peer_id)


async def _until_told(swarm: RealSwarm) -> None:
    while not all(record.speed.prefill_ns for record in swarm.view.workers()):
        await trio.sleep(0.01)


async def test_heirs_leave_too(model: TinyModel, tmp_path: Path) -> None:
    """One after the other, and each is paid for its part."""
    async with real_swarm(model, tmp_path, *THREE, (1, 3), (1, 3)) as swarm:
        workers = sorted(swarm.at(1), key=lambda worker: worker.peer_id)
        leaves_after(swarm, CHUNKS + 4, workers[0], workers[0])
        leaves_after(swarm, CHUNKS + 4, workers[1], workers[1])
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        report = await job.finish()
        assert [stage.peer_id for stage in report.stages[3:]] == [workers[0].peer_id, workers[1].peer_id]
        assert report.stages[1].peer_id == workers[2].peer_id
        assert_paid(report, model)
        assert_no_faults(swarm)


async def test_an_heir_that_dies_leaves_the_first_ones_pay_alone(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE, (1, 3), (1, 3)) as swarm:
        workers = sorted(swarm.at(1), key=lambda worker: worker.peer_id)
        leaves_after(swarm, CHUNKS + 4, workers[0], workers[0])
        workers[1].dies_after = CHUNKS + 4
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        report = await job.finish()
        assert [stage.peer_id for stage in report.stages[3:]] == [workers[0].peer_id]
        assert_paid(report, model)


async def test_a_job_goes_on_where_it_is_until_somebody_can_take_it(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm:
        leaver = swarm.at(1)[0]
        async with swarm.runner.generate(swarm.request(PROMPT, 2_000)) as job:
            swarm.nursery.start_soon(leaver.leave)
            await _goes_on(job)
            assert job.amendments == 0
            assert not any(record.peer_id == leaver.peer_id for record in swarm.view.workers())
            await swarm.join(1, 3)
            while not leaver.scope.cancel_called:
                await trio.sleep(0.01)
            await _goes_on(job)
            assert job.amendments == 1
            assert job._answer.tokens == model.greedy(PROMPT, len(job._answer.tokens))
        assert_no_faults(swarm)


async def test_a_worker_that_waited_in_vain_gets_no_fault(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm:
        leaver = swarm.at(1)[0]
        async with swarm.runner.generate(swarm.request(PROMPT, 2_000)) as job:
            leaver.real.jobs.leave()
            await _goes_on(job)
            leaver.kill()  # its patience is over
            await swarm.join(1, 3)
            while not job.amendments or job._mender.is_mending:
                await trio.sleep(0.01)
            await _goes_on(job)
            assert job._answer.tokens == model.greedy(PROMPT, len(job._answer.tokens))
        assert_no_faults(swarm)


async def test_a_job_that_is_about_to_end_just_ends(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mender_module, "_ENDS_S", 60.0)
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        middle = pair(swarm, 1)[0]
        leaves_after(swarm, CHUNKS + 8, middle, middle)
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments == 0
        assert len((await job.finish()).stages) == 3
        while not middle.scope.cancel_called:
            await trio.sleep(0.01)
        assert_no_faults(swarm)


async def test_no_new_job_meets_a_worker_that_leaves(model: TinyModel, tmp_path: Path) -> None:
    """Nor does one that was planned before the coordinator could know it fail."""
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        first, heir = pair(swarm, 0)
        first.real.jobs.leave()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(_ask_and_check, swarm, model, number)
        assert first.rows == []
        assert heir.rows
        while first.peer_id in {record.peer_id for record in swarm.view.workers()}:
            await trio.sleep(0.01)
        assert_no_faults(swarm)


async def _ask_and_check(swarm: RealSwarm, model: TinyModel, number: int) -> None:
    prompt = prompt_of(20, number)
    tokens, _ = await swarm.ask(prompt, 10)
    assert tokens == model.greedy(prompt, 10)


async def _goes_on(job: RunningJob) -> None:
    before = len(job._answer.tokens)
    while len(job._answer.tokens) < before + 5:
        await trio.sleep(0.01)
