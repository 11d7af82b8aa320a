"""Jobs that share passes in real stages: what one does, or leaves, shows in no other."""

from __future__ import annotations

import random

import pytest
import trio

from tests.node.real_stages import TinyModel, prompt_of, real_ring, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("seed", range(3))
async def test_jobs_that_join_and_leave_at_random_answer_as_alone(model: TinyModel, seed: int) -> None:
    """Sixteen of mixed lengths that share passes, beside eight that are given up at any point of theirs."""
    rng = random.Random(seed)
    prompts = [prompt_of(rng.choice([1, 3, 40, 300]), number) for number in range(16)]
    counts = [rng.randint(1, 24) for _ in prompts]
    answers: dict[int, list[int]] = {}
    async with real_ring(model, 3) as coordinator:

        async def ask(number: int) -> None:
            await trio.sleep(rng.uniform(0.0, 0.5))
            ticket = coordinator.ticket(len(prompts[number]), counts[number])
            end = await coordinator.answer(ticket, prompts[number])
            assert end.failures == []
            answers[number] = end.tokens

        async def give_up() -> None:
            await trio.sleep(rng.uniform(0.0, 0.5))
            with trio.move_on_after(rng.uniform(0.0, 0.4)):
                await coordinator.answer(coordinator.ticket(260, 100), prompt_of(260))

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(ask, number)
            for _ in range(8):
                nursery.start_soon(give_up)
        for stage in coordinator.stages:
            await stage.until_idle()
            assert stage.device.passes.statistics().largest > 1
    expected = [model.greedy(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert [answers[number] for number in range(16)] == expected


@pytest.mark.parametrize("seed", range(6))
async def test_a_job_that_is_left_at_any_time_frees_every_stage(model: TinyModel, seed: int) -> None:
    rng = random.Random(seed)
    async with real_ring(model, 3) as coordinator:
        for _ in range(5):
            with trio.move_on_after(rng.uniform(0.0, 0.2)):
                await coordinator.answer(coordinator.ticket(700, 2_000), prompt_of(700))
            for stage in coordinator.stages:
                await stage.until_idle(3)
        end = await coordinator.answer(coordinator.ticket(5), prompt_of(5))
        assert end.tokens == model.greedy(prompt_of(5), 8)
