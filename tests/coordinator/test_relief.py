"""A worker that becomes slow, or whose line does, all of it real: its job moves to another one, the client gets what it
would have got, every position of every layer is paid once, and who was slow has no fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio

from azu.economics import split, token_layers
from azu.errors import NetworkError
from azu.identity import Identity
from azu.planning import views_for
from azu.records import Link, Speed, WorkerRecord
from azu.tickets import JobTicket, StageEntry
from coordinator import hedging as hedging_module
from coordinator import mender as mender_module
from coordinator import relief as relief_module
from coordinator import swarm as swarm_module
from coordinator.hedging import Part, Slow
from coordinator.job import RunningJob
from coordinator.relief import Relief
from coordinator.usual import Usual
from node import links as links_module
from tests import worker_records
from tests.forwarders import Forwarders
from tests.node.real_stages import TinyModel, prompt_of, tiny_model
from tests.real_swarm import THREE, RealSwarm, Worker, real_swarm
from tests.worker_records import MANIFEST

PROMPT, COUNT, SLOW_AT = prompt_of(40), 240, 100
POSITIONS = len(PROMPT) + COUNT - 1
USUAL_S = 0.005  # what each pass takes longer from the beginning, or a fast machine ends the job after a few looks
LAG_S = 0.04  # many times what a step takes
LONG_S = 0.2  # and what it takes on a machine that has much else to do


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


@pytest.fixture
def earnest(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A move has to be worth what it is elsewhere, so that nothing else that the machine does is a reason for one."""
    monkeypatch.setattr(hedging_module, "_PAUSE_S", 2.0)
    monkeypatch.setattr(mender_module, "_GLANCE_S", 0.05)


async def measured(swarm: RealSwarm) -> RealSwarm:
    """The swarm, once all workers' records tell how fast they are, and the coordinator knows that as usual."""
    for worker in swarm.workers:
        slow_down(worker, USUAL_S)
        loaded = worker.real.jobs.loaded
        assert loaded is not None
        await worker.real.device.run(lambda stage=loaded.stage: stage.measure_pace(64))
        worker.rows.clear()
        worker.tells_speed = True
    found = [swarm.view.usual(worker.peer_id) for worker in swarm.workers]
    while not all(usual and usual.step_s(1, 1) for usual in found):
        await trio.sleep(0.01)
    return swarm


def slow_down(worker: Worker, seconds: float) -> None:
    """From now on each pass of a worker takes so much longer."""
    loaded = worker.real.jobs.loaded
    assert loaded is not None
    encode = loaded.stage._encode

    def late(*results: Any) -> Any:
        time.sleep(seconds)
        return encode(*results)

    loaded.stage._encode = late  # type: ignore[method-assign]


async def ask(swarm: RealSwarm, slow_at: int, slow: Callable[[Worker], object]) -> tuple[list[int], RunningJob, Worker]:
    """A job whose middle stage's worker becomes slow after so many tokens, not before the coordinator knows how fast
    they usually come: the tokens, the job, and that worker.
    """
    tokens: list[int] = []
    is_slow = False
    async with swarm.runner.generate(swarm.request(PROMPT, COUNT)) as job:
        middle = next(each for each in swarm.workers if each.peer_id == job.ticket.stages[1].peer_id)
        async for sampled in job.tokens():
            tokens.append(sampled.token)
            if len(tokens) >= slow_at and not is_slow and len(job._mender._hedging._trips) >= hedging_module._LOOKS:
                is_slow = True
                slow(middle)
        await job.finish()
    return tokens, job, middle


async def check_a_move(swarm: RealSwarm, answer: list[int], slow_down: Callable[[Worker], object]) -> None:
    """The job goes on at the runner-up, and all is paid once."""
    tokens, job, slow = await ask(swarm, SLOW_AT, slow_down)
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


async def test_a_job_leaves_a_worker_that_has_become_slow_and_all_is_paid_once(
    model: TinyModel, answer: list[int], tmp_path: Path, earnest: None
) -> None:
    async with real_swarm(model, tmp_path, *THREE, (1, 3)) as swarm:
        await check_a_move(await measured(swarm), answer, partial(slow_down, seconds=LONG_S))


async def test_a_job_leaves_a_worker_whose_line_to_the_next_stage_has_become_slow(
    model: TinyModel, answer: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earnest: None
) -> None:
    """The next stage's worker says so too, but nobody else has its layers."""
    for name, seconds in (("_ROUND_S", 0.05), ("_SOON_S", 0.05)):
        monkeypatch.setattr(links_module, name, seconds)
    lines = {2: Forwarders(), 4: Forwarders()}  # from the workers that have the middle layers to the last one

    def lengthen(worker: Worker) -> None:
        lines[worker.number].delay = LONG_S

    async with real_swarm(model, tmp_path, *THREE[:2]) as swarm:
        await swarm.join(*THREE[2], lines={2: lines[2]})
        await swarm.join(1, 3, lines={3: lines[4]})
        await swarm.until_known()
        await check_a_move(await measured(swarm), answer, lengthen)


async def test_two_in_a_row_take_over_from_a_slow_worker(
    model: TinyModel, answer: list[int], tmp_path: Path, earnest: None
) -> None:
    """Where nobody else has all of its layers."""
    async with real_swarm(model, tmp_path, *THREE, (1, 2), (2, 3)) as swarm:
        await measured(swarm)
        first, whole, last, *halves = (worker.peer_id for worker in swarm.workers)
        for half in halves:
            swarm.view.blame(half, 1, NetworkError("so that the job begins with the one that has both layers"))
        tokens, job, slow = await ask(swarm, SLOW_AT, partial(slow_down, seconds=2 * LONG_S))
        assert tokens == answer
        assert (slow.peer_id, job.amendments) == (whole, 1)
        assert [stage.peer_id for stage in job.ticket.stages] == [first, *halves, last]
        report = await job.finish()
        assert {stage.state for stage in report.stages} == {"credited"}
        assert sum(stage.token_layers for stage in report.stages) == report.token_layers
        assert swarm.view.faults(whole) == 0


async def test_where_nobody_else_has_the_layers_a_slow_worker_keeps_its_job(
    model: TinyModel, answer: list[int], tmp_path: Path
) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm:
        tokens, job, _ = await ask(await measured(swarm), COUNT - 30, partial(slow_down, seconds=LAG_S))
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


# --- what is read out of records

OURS = [Identity(bytes([number]) * 32).peer_id for number in range(1, 6)]
ONE, TWO, THIRD, NEAR, FAR = OURS
PARTS = ((0, 4), (4, 8), (8, 12))


def record_of(number: int, lines: Mapping[str, float] = MappingProxyType({}), slower: int = 1) -> WorkerRecord:
    """Of a worker that takes 2 ms for a layer and 1 ms more for each job, one here, or so many times that."""
    part = PARTS[min(number, 3) - 1] if number < 4 else PARTS[1]
    speed = Speed(decode_base_ns=slower * 2_000_000, decode_token_ns=slower * 1_000_000, prefill_ns=100_000)
    links = tuple(Link(peer_id=peer_id, rtt_us=round(rtt_s * 1e6)) for peer_id, rtt_s in lines.items())
    return worker_records.worker(number, (MANIFEST.digest, *part, "loaded"), speed=speed, links=links, jobs=1)


class Records:
    """What a coordinator knows of five workers: three with a job, and two that could stand in for the second."""

    def __init__(self) -> None:
        self.records = {each.peer_id: each for each in (
            record_of(1, {TWO: 0.01, THIRD: 0.01}), record_of(2, {ONE: 0.01, THIRD: 0.01, NEAR: 0.01}),
            record_of(3, {ONE: 0.01, TWO: 0.01}), record_of(4, {ONE: 0.01, THIRD: 0.01}),
            record_of(5, {ONE: 0.3, THIRD: 0.3}),
        )}  # fmt: skip
        self.usual = {peer_id: Usual() for peer_id in self.records}
        for now in range(10):
            self.poll(float(now))
        self.relief = Relief(self.records.get, self.usual.get, lambda _: 0)

    def poll(self, now: float, **answers: float) -> None:
        for peer_id, record in self.records.items():
            self.usual[peer_id].note(record, answers.get(peer_id, 0.004), now)

    def ticket(self, *peers: str) -> JobTicket:
        chain = {1: [(0, 12)], 2: [(0, 4), (4, 12)], 3: PARTS}[len(peers)]
        stages = [{"peer_id": p, "start": start, "end": end} for p, (start, end) in zip(peers, chain, strict=True)]
        return JobTicket.model_validate({
            "job_id": bytes(16), "epoch": 0, "manifest": MANIFEST.digest, "n_layers": 12, "stages": stages,
            "dtype": "float16", "prompt_tokens": 10, "max_tokens": 1_000, "stop_tokens": (), "sampling": {},
            "price": 1, "begun_at": 0, "issued_at": 0, "expires_at": 1, "coordinator": ONE,
        })  # fmt: skip


def test_what_a_step_costs_in_a_stage() -> None:
    known = Records()
    known.records[TWO] = record_of(2, {ONE: 0.01, THIRD: 0.2}, slower=5)
    for now in range(10, 14):
        known.poll(float(now), **{TWO: 0.09})
    parts = known.relief.parts(known.ticket(ONE, TWO, THIRD))
    assert {part[1:]: reading for part, reading in parts.items() if part.peer_id == TWO} == {
        ("pass", ""): (pytest.approx(0.06), pytest.approx(0.012)),
        ("answer", ""): (pytest.approx(0.045), pytest.approx(0.002)),
        ("line", ONE): (pytest.approx(0.005), 0.0),
        ("line", THIRD): (pytest.approx(0.1), 0.0),
    }
    there_and_back = known.relief.parts(known.ticket(ONE, TWO))[Part(ONE, "line", TWO)]
    assert there_and_back.now_s == pytest.approx(0.01)
    assert {part.kind for part in known.relief.parts(known.ticket(ONE))} == {"pass", "answer"}


async def test_a_job_goes_where_passes_and_lines_together_are_faster() -> None:
    known = Records()
    ticket = known.ticket(ONE, TWO, THIRD)

    def accepts(step_s: float, *peer_ids: str) -> bool:
        slow = ticket.stages[1]
        borders = [slow.start, slow.start + 1, slow.end] if len(peer_ids) == 2 else [slow.start, slow.end]
        stages = [
            StageEntry(peer_id=peer_id, start=start, end=end)
            for peer_id, (start, end) in zip(peer_ids, pairwise(borders), strict=True)
        ]
        return known.relief.accepts(MANIFEST, ticket, Slow(TWO, step_s, 0.02, step_s), 500, stages)

    # Near: 16 ms of a pass with two jobs, 10 ms of lines, 2 ms of answers; far: 316 ms and 2 ms.
    assert accepts(0.1, NEAR)
    assert not accepts(0.1, FAR)
    assert not accepts(0.319, FAR)
    assert accepts(0.4, FAR)
    assert not accepts(0.029, NEAR)
    # In a row they compute as much together, over the lines of both.
    assert not accepts(0.32, NEAR, FAR)
    assert accepts(0.5, NEAR, FAR)
    away_s = known.relief.away_s(MANIFEST, ticket, 1)
    views = {view.peer_id: view for view in views_for(MANIFEST, known.records.values())}
    assert [away_s(views[peer_id]) for peer_id in (NEAR, FAR)] == [pytest.approx(0.01), pytest.approx(0.3)]
    for now in range(10, 14):
        known.poll(float(now), **{NEAR: 2.0})  # it answers late itself
    assert not accepts(0.1, NEAR)
