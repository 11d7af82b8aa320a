"""Workers that die while they run a job, all of it real: the client gets what it would have got, nobody computes what
it had computed before, and nobody is paid twice.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.node.real_stages import TinyModel, prompt_of, tiny_model
from tests.real_swarm import real_swarm

THREE = ((0, 1), (1, 3), (3, 4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("tiny"))


async def test_a_middle_stage_killed_in_decoding(model: TinyModel, tmp_path: Path) -> None:
    prompt = prompt_of(300)
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        first = min(swarm.at(1), key=lambda worker: worker.peer_id)
        first.dies_after = 12
        tokens, job = await swarm.ask(prompt, 40)
        assert tokens == model.greedy(prompt, 40)
        assert job.amendments == 1
