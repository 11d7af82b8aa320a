"""Time per token when stages are far apart: against what they computed meanwhile plus one trip round the ring.

    python -m benchmarks.distance [--stages 3] [--rtt 20,80,200] [--tokens 32] [--rounds 3]

Each worker tells others the address of a TCP forwarder in this process, which hands on what it gets half a round trip
later, in both directions. So each connection of two workers is as long as that. A hidden second round trip for each
token would show as a ratio far above 1. What the stages computed is what they say themselves (`azu-node status`):
after a long wait the same pass takes longer, since caches and cores have gone to others.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.asking import ask, computed
from benchmarks.engine import KV_TOKENS, PROMPT, vram_for
from tests.forwarders import Forwarders
from tests.local_swarm import LocalSwarm


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Figures:
    """Seconds: from token to token, computing for one in all stages, and to the first token."""

    per_token: float
    compute: float
    ttft: float


def measure(swarm: LocalSwarm, tokens: int, rounds: int) -> Figures:
    """Medians over the rounds, after one that does not count."""
    ask(swarm, PROMPT, tokens)
    before = computed(swarm)
    answers = [ask(swarm, PROMPT, tokens) for _ in range(rounds)]
    compute = sum((now[0] - then[0]) / (now[1] - then[1]) for now, then in zip(computed(swarm), before, strict=True))
    pauses = [pause for answer in answers for pause in answer.pauses]
    return Figures(statistics.mean(pauses), compute, statistics.median(answer.ttft for answer in answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, choices=[1, 3, 6], default=3)
    parser.add_argument("--rtt", default="20,80,200", help="milliseconds")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    forwarders = Forwarders()
    with tempfile.TemporaryDirectory() as folder, LocalSwarm(Path(folder), kv_tokens=KV_TOKENS) as swarm:
        vram = vram_for(swarm, arguments.stages, "float32")
        for _ in range(arguments.stages):
            port = free_port()
            announced = f"/ip4/127.0.0.1/tcp/{forwarders.to(port)}"
            listen = ("--listen", f"/ip4/127.0.0.1/tcp/{port}")
            swarm.add_worker(vram, *listen, "--announce", announced)
        swarm.wait_until_covered()
        print(f"SmolLM2-135M float32, {arguments.stages} stages, means over {arguments.rounds} answers")
        print("| RTT ms | ms per token | computing | trip round the ring | ratio | TTFT ms |")
        print("| --- | --- | --- | --- | --- | --- |")
        for rtt in (0.0, *map(float, arguments.rtt.split(","))):
            forwarders.delay = rtt / 2e3
            trip = arguments.stages * rtt / 2e3
            found = measure(swarm, arguments.tokens, arguments.rounds)
            ratio = found.per_token / (found.compute + trip)
            figures = f"{found.per_token * 1e3:.1f} | {found.compute * 1e3:.1f} | {trip * 1e3:.0f} | {ratio:.2f}"
            print(f"| {rtt:.0f} | {figures} | {found.ttft * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
