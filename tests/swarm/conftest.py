"""One running swarm of three workers for all tests that do not break it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.local_swarm import LocalSwarm
from tests.swarm.reference import Reference

# Enough for 12 of SmolLM2's 30 layers wherever they lie, so for no more than a part of the model.
WORKER_VRAM = "440MiB"


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Three workers that cover SmolLM2 between them. Leave it as you found it."""
    with LocalSwarm(tmp_path_factory.mktemp("swarm")) as running:
        for _ in range(3):
            running.add_worker(WORKER_VRAM)
        running.wait_until_covered()
        yield running


@pytest.fixture(scope="session")
def reference(swarm: LocalSwarm) -> Reference:
    """The unsplit model in this process, loaded from the same files."""
    return Reference(swarm.folder / "coordinator", swarm.manifest)


@pytest.fixture
def client(swarm: LocalSwarm) -> OpenAI:
    """The official client, pointed at the swarm's coordinator."""
    return OpenAI(base_url=f"{swarm.url}/v1", api_key="none", max_retries=0, timeout=240)


@pytest.fixture
def ask(client: OpenAI, swarm: LocalSwarm) -> Any:
    """Ask one question greedily; returns (text, finish reason, usage)."""

    def greedy(question: str, max_tokens: int = 16) -> tuple[str, str, Any]:
        answer = client.chat.completions.create(
            model=swarm.model_id,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
        )
        return answer.choices[0].message.content or "", answer.choices[0].finish_reason, answer.usage

    return greedy
