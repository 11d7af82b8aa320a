"""Streamed questions to a coordinator, with the time of each token."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

from tests.local_swarm import LocalSwarm

__all__ = ["Answer", "ask", "ask_all", "computed"]


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
    host = swarm.url.partition("//")[2]
    received: list[tuple[float, bytes]] = []
    with closing(HTTPConnection(host, timeout=600)) as connection:
        started = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
        response = connection.getresponse()
        while data := response.read1():
            received.append((time.perf_counter(), data))
    assert response.status == 200, b"".join(data for _, data in received)
    return _read(started, received)


def _read(started: float, received: Sequence[tuple[float, bytes]]) -> Answer:
    """The events in what came when. Read afterwards: clients of an application do not share cores with its workers."""
    times: list[float] = []
    stages, rest = 0, b""
    for at, data in received:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    times.append(at)
                if chunk.get("usage"):
                    stages = len(chunk["usage"]["azu"]["stages"])
    assert times, "no token came"
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
