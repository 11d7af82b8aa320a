"""Real stages on a real ring, one of which lies in its receipt: who is paid, who is not, and who is told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from azu.crossings import NOTHING
from azu.errors import NetworkError
from azu.tickets import Receipt
from coordinator.generation import JobReport
from node.job import StageJob
from tests.node.real_stages import TinyModel, prompt_of, tiny_model
from tests.real_swarm import RealSwarm, real_swarm

FOUR = ((0, 1), (1, 2), (2, 3), (3, 4))
PROMPT = prompt_of(300)  # two chunks
COUNT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


Lies = dict[str, Callable[[Receipt], Receipt]]


@pytest.fixture
def lies(monkeypatch: pytest.MonkeyPatch) -> Lies:
    """What workers make of their receipts before they sign them, by peer id."""
    lies: Lies = {}
    honest = StageJob.receipt

    def receipt(job: StageJob) -> Receipt:
        told = honest(job)
        return lies.get(told.peer_id, lambda receipt: receipt)(told)

    monkeypatch.setattr(StageJob, "receipt", receipt)
    return lies


def reasons(report: JobReport) -> list[str]:
    return [stage.reason for stage in report.stages]


async def ask(swarm: RealSwarm) -> JobReport:
    tokens, job = await swarm.ask(PROMPT, COUNT)
    assert tokens == swarm.model.greedy(PROMPT, COUNT)  # the client is not concerned
    return await job.finish()


def _more(receipt: Receipt) -> Receipt:
    return receipt.model_copy(update={"tokens": receipt.tokens + 1_000})


def _fewer(receipt: Receipt) -> Receipt:
    return receipt.model_copy(update={"tokens": receipt.tokens - 1})


def _other_input(receipt: Receipt) -> Receipt:
    return receipt.model_copy(update={"received": receipt.received.model_copy(update={"digest": "0" * 64})})


def _other_output(receipt: Receipt) -> Receipt:
    return receipt.model_copy(update={"sent": receipt.sent.model_copy(update={"digest": "0" * 64})})


def _refuses(receipt: Receipt) -> Receipt:
    raise NetworkError("it has better things to do")


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (_more, ["", "", "", ""]),
        (_fewer, ["", "short", "", ""]),
        (_other_input, ["contradicted", "contradicted", "", ""]),
        (_other_output, ["", "contradicted", "contradicted", ""]),
        (_refuses, ["", "no_receipt", "", ""]),
    ],
)
async def test_what_a_lie_costs_whom(
    model: TinyModel, tmp_path: Path, lies: Lies, lie: Callable[[Receipt], Receipt], expected: list[str]
) -> None:
    async with real_swarm(model, tmp_path, *FOUR) as swarm:
        lies[swarm.at(1)[0].peer_id] = lie
        report = await ask(swarm)
        assert reasons(report) == expected
        assert (
            sum((await swarm.meter.earnings()).values())
            == report.credited
            == sum(not reason for reason in expected) * report.stages[0].earned
        )
        assert report.credited + report.held + report.platform == report.cost
        doubted = [bool(swarm.view.faults(stage.peer_id)) for stage in report.stages]
        assert doubted == [reason == "contradicted" for reason in expected]


async def test_a_last_stage_that_says_it_sampled_others_is_wrong_by_itself(
    model: TinyModel, tmp_path: Path, lies: Lies
) -> None:
    async with real_swarm(model, tmp_path, *FOUR) as swarm:
        lies[swarm.at(3)[0].peer_id] = _other_output
        assert reasons(await ask(swarm)) == ["", "", "", "contradicted"]


async def test_a_receipt_of_another_job_or_epoch_is_none(
    model: TinyModel, tmp_path: Path, lies: Lies, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Receipt] = []

    def replay(receipt: Receipt) -> Receipt:
        kept.append(receipt)
        return kept[0]

    def of_the_epoch_before(receipt: Receipt) -> Receipt:
        return receipt.model_copy(update={"epoch": receipt.epoch - 1})

    caplog.set_level(logging.WARNING, "coordinator.attendance")
    async with real_swarm(model, tmp_path, *FOUR, (2, 3)) as swarm:
        liar, lost = swarm.at(1)[0], min(swarm.at(2), key=lambda worker: worker.peer_id)
        lies[liar.peer_id] = replay
        assert reasons(await ask(swarm)) == ["", "", "", ""]
        await swarm.until_idle()
        assert reasons(await ask(swarm)) == ["", "no_receipt", "", ""]
        await swarm.until_idle()
        lies[liar.peer_id] = of_the_epoch_before
        lost.dies_after = len(lost.rows) + 4
        report = await ask(swarm)
        assert reasons(report) == ["", "no_receipt", "", ""]
        assert swarm.overlay.statistics().violations == {liar.peer_id: 2}
        assert [record.message for record in caplog.records].count("receipt refused") == 2


async def test_a_job_that_is_ended_while_rows_are_under_way_is_agreed_on(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *FOUR) as swarm:
        for count in (1, 2, 9):
            request = swarm.request(PROMPT, 2_000)
            async with swarm.runner.generate(request) as job, aclosing(job.tokens()) as tokens:
                while count and await anext(tokens):
                    count -= 1
            report = await job.finish()
            assert reasons(report) == [""] * 4
            assert report.completion_tokens < 2_000
            await swarm.until_idle()


async def test_receipts_tell_of_what_neighbours_gave_each_other(model: TinyModel, tmp_path: Path, lies: Lies) -> None:
    told: dict[int, Receipt] = {}
    async with real_swarm(model, tmp_path, *FOUR) as swarm:
        for worker in swarm.workers:
            lies[worker.peer_id] = lambda receipt: told.setdefault(receipt.stage, receipt)
        report = await ask(swarm)
        positions = len(PROMPT) + COUNT - 1
        assert [told[index].tokens for index in range(4)] == [positions] * 4
        for index in range(3):
            assert told[index].sent == told[index + 1].received != NOTHING
            assert (told[index].sent.start, told[index].sent.end) == (0, positions)
        assert len({told[index].sent.digest for index in range(4)}) == 4
        assert report.held == 0
