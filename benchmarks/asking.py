"""Streamed questions to a coordinator, with the time of each token."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx

from tests.local_swarm import LocalSwarm

__all__ = ["Answer", "ask", "ask_all", "computed"]

# One for all questions, as an application has it: each new one reads all of the system's certificates, for 20 ms.
_client = httpx.Client(timeout=600)


@dataclass(frozen=True)
class Answer:
    """When it was asked, and when each token came: seconds of one clock; and through how many stages."""

    started: float
    times: list[float]
    stages: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.started

    @property
    def rate(self) -> float:
        """Decoded tokens per second."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    @property
    def rate_with_ttft(self) -> float:
        """Tokens per second, the prompt's time included."""
        return len(self.times) / (self.times[-1] - self.started)

    @property
    def pauses(self) -> list[float]:
        """Seconds from each token to the next."""
        return [later - earlier for earlier, later in pairwise(self.times)]


def ask(swarm: LocalSwarm, prompt: str, tokens: int) -> Answer:
    """One greedy answer, which may end before `tokens`."""
    request = {
        "model": swarm.model_id, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
        "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    times: list[float] = []
    stages = 0
    started = time.perf_counter()
    url = f"{swarm.url}/v1/chat/completions"
    with _client.stream("POST", url, json=request) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    times.append(time.perf_counter())
                if chunk.get("usage"):
                    stages = len(chunk["usage"]["azu"]["stages"])
    assert times, f"no token came (status {response.status_code})"
    return Answer(started, times, stages)


def ask_all(swarm: LocalSwarm, prompts: Sequence[str], tokens: Sequence[int]) -> list[Answer]:
    """All at once; `tokens` of each."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(partial(ask, swarm), prompts, tokens))


def computed(swarm: LocalSwarm) -> list[tuple[float, int]]:
    """Of each worker, since its start: seconds in passes, and passes."""
    found = []
    for number in range(1, len(swarm.workers) + 1):
        command = ["azu-node", "status", "--json", "--data-dir", str(swarm.folder / f"worker{number}")]
        program = Path(sys.executable).with_name(command[0])
        done = subprocess.run([program, *command[1:]], capture_output=True, check=True)
        total = json.loads(done.stdout)["since_start"]
        found.append((total["compute_s"], total["passes"]))
    return found
