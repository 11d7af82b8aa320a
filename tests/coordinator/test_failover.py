"""Workers that die while they run a job, all of it real: the client gets what it would have got, nobody computes what
it had computed before, and nobody is paid twice.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from azu.channel import Channel
from azu.economics import split, token_layers
from azu.errors import NetworkError
from azu.tickets import JobTicket
from azu.wire.messages import RING, RING_PROTOCOL, Hello, Refused
from coordinator import mender as mender_module
from coordinator.job import RunningJob
from tests.node.real_stages import TinyModel, next_of, prompt_of, tiny_model
from tests.real_swarm import DRAWN, STARTS, THREE, RealSwarm, Worker, pair, real_swarm

PROMPT, COUNT = prompt_of(600), 24
CHUNKS = 3  # of the prompt
POSITIONS = len(PROMPT) + COUNT - 1  # that go through every layer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def assert_nothing_was_run_twice(swarm: RealSwarm, lost: set[int]) -> None:
    """Survivors ran each position once, and so did a substitute, in larger steps where the tokens were known."""
    for start in STARTS:
        first, second = pair(swarm, start)
        assert sum((second if start in lost else first).rows) == POSITIONS
        assert start in lost or not second.rows


@pytest.mark.parametrize("steps", [2, CHUNKS + 8], ids=["in-prefill", "in-decode"])
@pytest.mark.parametrize(
    "lost", [{0}, {1}, {3}, {0, 1}, {1, 3}, {0, 3}, {0, 1, 3}], ids=lambda lost: "-".join(map(str, lost))
)
async def test_workers_that_die_cost_a_pause(model: TinyModel, tmp_path: Path, lost: set[int], steps: int) -> None:
    """The last one dies with a token that it has sampled and told nobody."""
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        victims = [pair(swarm, start)[0] for start in lost]

        def kill_all(worker: Worker) -> None:
            if len(worker.rows) == steps:
                for victim in victims:
                    swarm.soon(victim.kill)

        victims[-1].hook = kill_all
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments >= 1
        assert_nothing_was_run_twice(swarm, lost)
        report = await job.finish()
        assert [stage.state for stage in report.stages] == ["credited"] * 3
        assert {stage.peer_id for stage in report.stages} == {
            pair(swarm, start)[start in lost].peer_id for start in STARTS
        }
        # Each position is paid once, to whoever had the stage at the end.
        price = report.cost // report.token_layers
        paid = [split(token_layers(POSITIONS, end - start) * price).worker for start, end in THREE]
        assert sum((await swarm.meter.earnings()).values()) == sum(paid)


async def test_a_new_first_stage_may_be_behind_the_others(model: TinyModel, tmp_path: Path) -> None:
    """The new last one is fed by the middle one, and samples while the new first one still runs the prompt."""
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        (first, slow), (middle, _), (last, _) = (pair(swarm, start) for start in STARTS)

        def kill_both(worker: Worker) -> None:
            if len(worker.rows) == CHUNKS + 8:
                swarm.soon(first.kill)
                swarm.soon(last.kill)

        middle.hook = kill_both
        slow.hook = lambda _: time.sleep(0.3)
        tokens, _ = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert_nothing_was_run_twice(swarm, {0, 3})


async def test_sampling_goes_on_with_the_same_random_numbers_and_penalties(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        undisturbed, _ = await swarm.ask(PROMPT, COUNT, DRAWN)
        await swarm.until_idle()
        first, _ = pair(swarm, 3)
        first.dies_after = len(first.rows) + CHUNKS + 8
        tokens, job = await swarm.ask(PROMPT, COUNT, DRAWN)
        assert job.amendments >= 1
        assert tokens == undisturbed
        assert tokens != model.greedy(PROMPT, COUNT)


async def test_a_single_stage_is_replaced_by_two(
    model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coordinator.mender")
    async with real_swarm(model, tmp_path, (0, 4), (0, 2), (1, 4)) as swarm:
        whole, start, end = swarm.workers
        for other in start, end:
            swarm.view.blame(other.peer_id, 1, NetworkError("so that the job begins with the one that has all"))
        whole.dies_after = CHUNKS + 8
        undisturbed = model.greedy(PROMPT, COUNT)
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == undisturbed
        assert [stage.peer_id for stage in job.ticket.stages] == [start.peer_id, end.peer_id]
        events = [record.message for record in caplog.records if record.name == "coordinator.mender"]
        assert events == ["stage lost", "job amended", "job goes on"]


async def test_a_worker_with_more_layers_takes_a_stage_over_and_runs_no_others(
    model: TinyModel, tmp_path: Path
) -> None:
    async with real_swarm(model, tmp_path, *THREE, (0, 4)) as swarm:
        for stage in swarm.at(1):
            stage.dies_after = CHUNKS + 8
        whole = next(worker for worker in swarm.at(0) if worker.end == 4)
        swarm.view.blame(whole.peer_id, 1, NetworkError("so that the job begins with the others"))
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments >= 1
        assert [(stage.start, stage.end) for stage in job.ticket.stages] == list(THREE)
        assert job.ticket.stages[1].peer_id == whole.peer_id


async def test_one_substitute_after_the_other_dies(model: TinyModel, tmp_path: Path) -> None:
    """At last nobody has all of its layers, and two in a row take them over."""
    async with real_swarm(model, tmp_path, *THREE, (1, 3), (1, 3), (1, 2), (2, 3)) as swarm:
        whole = sorted((w for w in swarm.workers if (w.start, w.end) == (1, 3)), key=lambda worker: worker.peer_id)
        halves = swarm.workers[-2:]
        for half in halves:
            swarm.view.blame(half.peer_id, 1, NetworkError("so that the job begins with the others"))
        for number, worker in enumerate(whole):
            worker.dies_after = 3 + 2 * number
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments >= 3
        for start in (0, 3):
            assert sum(swarm.at(start)[0].rows) == POSITIONS
        assert [stage.peer_id for stage in job.ticket.stages][1:-1] == [half.peer_id for half in halves]
        report = await job.finish()
        assert [(stage.state, stage.tokens, stage.start) for stage in report.stages] == [
            ("credited", POSITIONS, start) for start in range(4)
        ]


async def test_who_is_lost_while_a_ticket_is_written_down_is_replaced_next(
    model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In that ticket two have the place of another, and the stage behind them has another number."""
    caplog.set_level(logging.INFO, "coordinator.mender")
    async with real_swarm(model, tmp_path, *THREE, (1, 2), (2, 3), (3, 4)) as swarm:
        first, whole, _, *halves, _ = swarm.workers
        last, heir = pair(swarm, 3)
        for half in halves:
            swarm.view.blame(half.peer_id, 1, NetworkError("so that the job begins with the one that has both layers"))
        whole.dies_after = CHUNKS + 8
        jobs: list[RunningJob] = []

        async def note(ticket: JobTicket, _: object) -> bool:
            if len(ticket.stages) == 4 and not last.scope.cancel_called:
                last.kill()
                while len(jobs[0]._mender._lost) < 2:
                    await trio.sleep(0.01)
            return True

        async with swarm.runner.generate(replace(swarm.request(PROMPT, COUNT), note=note)) as job:
            jobs.append(job)
            tokens = [sampled.token async for sampled in job.tokens()]
        assert tokens == model.greedy(PROMPT, COUNT)
        assert [stage.peer_id for stage in job.ticket.stages] == [w.peer_id for w in (first, *halves, heir)]
        events = [record.message for record in caplog.records if record.name == "coordinator.mender"]
        assert events == ["stage lost", "stage lost", "job amended", "job amended", "job goes on"]


async def test_however_many_substitutes_die_a_job_with_tokens_goes_on(model: TinyModel, tmp_path: Path) -> None:
    """Where workers break all the time, none of many amendments may bring a token."""
    async with real_swarm(model, tmp_path, *THREE, *[(1, 3)] * 10) as swarm:
        first, *others, _ = sorted(swarm.at(1), key=lambda worker: worker.peer_id)
        first.dies_after = CHUNKS + 8
        for worker in others:
            worker.dies_after = 1
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments >= 10
        for start in (0, 3):
            assert sum(swarm.at(start)[0].rows) == POSITIONS


async def test_where_the_history_is_too_small_the_stage_before_computes_again(model: TinyModel, tmp_path: Path) -> None:
    """Nothing else does."""
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        (first, _), (middle, _), (last, substitute) = (pair(swarm, start) for start in STARTS)
        middle.real.jobs.history.limit = 500 * 32 * 4
        last.dies_after = CHUNKS + 8
        tokens, _ = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert middle.real.jobs.history.dropped >= 1
        assert sum(middle.rows) > POSITIONS
        assert sum(first.rows) == sum(substitute.rows) == POSITIONS
        assert all(worker.real.jobs.history.held == 0 for worker in (first, middle, substitute))


async def test_a_job_waits_for_a_worker_that_takes_the_stage_over(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm:
        swarm.at(1)[0].dies_after = CHUNKS + 8
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_add_when_lost, swarm)
            tokens, _ = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)


async def _add_when_lost(swarm: RealSwarm) -> None:
    while not swarm.workers[1].scope.cancel_called:
        await trio.sleep(0.05)
    await trio.sleep(0.5)
    await swarm.add(1, 3)


async def test_a_worker_with_an_old_epoch_is_turned_away(model: TinyModel, tmp_path: Path) -> None:
    """As one that was stopped for a while; and one with the new epoch that is none of the job's."""
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        (first, _), (stale, _), (last, _) = (pair(swarm, start) for start in STARTS)
        async with swarm.runner.generate(swarm.request(PROMPT, 2_000)) as job:
            await _still_runs(job)
            job.lose(job._crew.stages[1], NetworkError("silent for 15 s"))
            while not job.amendments or job._mender.is_mending:
                await trio.sleep(0.01)
            for epoch, code in ((0, "stale_epoch"), (1, "")):
                async with await stale.real.overlay.open_stream(last.peer_id, RING_PROTOCOL) as stream:
                    channel = Channel(stream, RING)
                    await channel.send(Hello(job_id=bytes.fromhex(job.job_id), epoch=epoch, stage=1))
                    assert getattr(await next_of(channel, Refused), "code", "") == code
            assert last.real.overlay.statistics().violations == {stale.peer_id: 1}
            await _still_runs(job)
        assert first.real.overlay.statistics().violations == {}


async def _still_runs(job: RunningJob) -> None:
    before = len(job._answer.tokens)
    while len(job._answer.tokens) < before + 5:
        await trio.sleep(0.01)


async def test_a_job_that_stalls_is_paused_and_goes_on(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage's token to the first one gets lost, and nobody notices."""
    monkeypatch.setattr(mender_module, "_STALL_S", 1.0)
    async with real_swarm(model, tmp_path, *THREE) as swarm:
        last = swarm.at(3)[0]

        def lose_the_next(worker: Worker) -> None:
            if len(worker.rows) == CHUNKS + 5:
                swarm.soon(lambda: _forget_what_is_sent(last))

        last.hook = lose_the_next
        tokens, job = await swarm.ask(PROMPT, COUNT)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert job.amendments >= 1
        assert all(sum(worker.rows) == POSITIONS for worker in swarm.workers)


def _forget_what_is_sent(worker: Worker) -> None:
    [job] = worker.real.jobs._jobs.values()
    link = job._leg._link
    assert link is not None

    async def nowhere(_: object) -> None:
        await trio.lowlevel.checkpoint()

    link.pack = None
    link.send_next = nowhere  # type: ignore[method-assign]
