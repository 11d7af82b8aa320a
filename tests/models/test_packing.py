"""Several jobs in one forward pass give each the answer that it has alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from azu.models.memory import takes_turns
from azu.models.splice import Part, Stage
from tests.models.families import ALONE, FAMILIES, OTHERS, Family
from tests.models.test_families import Models

pytestmark = pytest.mark.usefixtures("one_thread")

JOBS = 6
CLOSE = 2e-5  # between logits whose sums were made in another order


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("families"))


@dataclass
class Job:
    """One job's way through all stages: its tokens so far, and the logits after each step."""

    tokens: list[int]
    left: int
    caches: list[Any]
    sent: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def next_chunk(self, chance: random.Random) -> list[int]:
        waiting = self.tokens[self.sent :]
        return waiting[: chance.randint(1, len(waiting))]

    def take(self, count: int, logits: torch.Tensor) -> None:
        self.sent += count
        if self.sent == len(self.tokens):
            self.logits.append(logits)
            self.left -= 1
            self.tokens.append(int(logits.argmax()))


def new_job(stages: list[Stage], chance: random.Random) -> Job:
    prompt = [chance.randrange(3, 64) for _ in range(chance.randint(1, 14))]
    return Job(prompt, chance.randint(3, 9), [stage.new_cache(8) for stage in stages])


def step(stages: list[Stage], jobs: list[Job], chance: random.Random) -> None:
    """Run the next tokens of these jobs together."""
    chunks = [job.next_chunk(chance) for job in jobs]
    hidden = [torch.tensor(chunk) for chunk in chunks]
    for index, stage in enumerate(stages):
        parts = [Part(each, job.caches[index], job.sent) for each, job in zip(hidden, jobs, strict=True)]
        if stage.can_pack:
            rows = [1] * len(parts) if stage.is_last else [len(part.inputs) for part in parts]
            hidden = list(stage.forward_pack(parts).split(rows))
        else:
            hidden = [stage.forward(part.inputs, part.cache, part.position) for part in parts]
    for job, chunk, logits in zip(jobs, chunks, hidden, strict=True):
        assert logits.shape == (1, 64)
        job.take(len(chunk), logits[0])


def alone(stages: list[Stage], prompt: list[int], count: int) -> Job:
    job = Job(list(prompt), count, [stage.new_cache() for stage in stages])
    while job.left:
        hidden = torch.tensor(job.tokens[job.sent :])
        for stage, cache in zip(stages, job.caches, strict=True):
            hidden = stage.forward(hidden, cache, job.sent)
        job.take(len(job.tokens) - job.sent, hidden[0])
    return job


@pytest.mark.parametrize("family", FAMILIES + OTHERS, ids=lambda family: family.name)
def test_jobs_that_share_a_pass_answer_as_alone(models: Models, family: Family) -> None:
    """Prompts come in chunks of any size, beside others' single tokens; jobs join and leave at any step."""
    chance, stages = (
        random.Random(7),
        models.stages(family.name, (0, 1, models.published(family.name).manifest.n_layers)),
    )
    assert all(stage.can_pack == (family.name not in ALONE) for stage in stages)
    assert family.name in ALONE or not takes_turns(type(stages[0].model).__name__), "the memory estimate's own list"
    running: list[Job] = []
    done: list[Job] = []
    prompts: dict[int, tuple[list[int], int]] = {}
    while len(done) < JOBS:
        while len(running) < 4 and len(prompts) < JOBS and chance.random() < 0.6:
            job = new_job(stages, chance)
            prompts[id(job)] = (list(job.tokens), job.left)
            running.append(job)
        joined = [job for job in running if chance.random() < 0.8]
        if joined:
            step(stages, joined, chance)
        done += [job for job in running if not job.left]
        running = [job for job in running if job.left]
    for job in done:
        expected = alone(stages, *prompts[id(job)])
        for got, wanted in zip(job.logits, expected.logits, strict=True):
            assert (got - wanted).abs().max() <= CLOSE * max(1.0, wanted.abs().max())
        assert job.tokens == expected.tokens, "two logits lay closer together than the order of summation decides"


def test_a_pack_leaves_the_model_as_it_was(models: Models) -> None:
    [stage] = models.stages("Llama", (0, 4))
    before = alone([stage], [5, 6, 7], 3)
    parts = [Part(torch.tensor([5, 6]), stage.new_cache(), 0) for _ in range(2)]
    stage.forward_pack(parts)
    with pytest.raises(IndexError):
        stage.forward_pack(
            [Part(torch.tensor([5]), stage.new_cache(), 0), Part(torch.tensor([10_000]), stage.new_cache(), 0)]
        )
    after = alone([stage], [5, 6, 7], 3)
    assert all(one.equal(other) for one, other in zip(before.logits, after.logits, strict=True))
