"""What the engine costs and gains: against transformers in one process, and with many jobs at once.

    python -m benchmarks.engine [--rounds 3] [--dtype float32] [--stage-threads 1] [--only one,many,busy]

The stages are real azu-node processes on loopback, asked through the coordinator's HTTP endpoint with streaming;
transformers runs the unsplit model in this process, with the same weights, prompts, dtype and thread count. One swarm
runs at a time. All runs of a round follow one another, so that what else the machine does hits each alike; figures are
medians over the rounds, and ratios are of one run of this program.

    one    1 job through 1, 3 and 6 stages: against generate(); and what a hop costs beyond what stages compute
    many   16 jobs on 3 stages: against 1 job, a static batch in generate(), and transformers' continuous batching
    busy   TTFT of a prompt of 1,024 tokens while 8 jobs decode, and those jobs' p99 time per token meanwhile
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from azu.distribution import Library
from azu.models.memory import stage_memory
from azu.wire.tensors import WeightFormat
from benchmarks.asking import Answer, ask, ask_all, computed
from benchmarks.unsplit import Unsplit
from tests.local_swarm import LocalSwarm

PROMPT = "Tell me a long story about a fox, an owl and a very old oak tree."
TOPICS = ("a fox", "an owl", "rain", "the sea", "a violin", "bread", "a lighthouse", "snow", "a clock", "two brothers",
          "a garden", "the moon", "a train", "a river", "a letter", "the desert")  # fmt: skip
# Positions of KV cache that stages have room for: so many that layers weigh more than embeddings and head, and workers
# that can hold the largest of equal stages can hold no more layers than that.
KV_TOKENS = 65_536
WARM_TOKENS = 8


def vram_for(swarm: LocalSwarm, stages: int, dtype: WeightFormat) -> str:
    """What each worker has to offer so that so many of them are needed, and layers can be prepacked."""
    manifest = dict(Library(swarm.folder / "coordinator").manifests())[swarm.manifest]
    cuts = [manifest.n_layers * number // stages for number in range(stages + 1)]
    needs = (stage_memory(manifest, *cut, dtype, KV_TOKENS, packed=True).total for cut in pairwise(cuts))
    return f"{-(-max(needs) >> 20)}MiB"


def prompts(count: int) -> list[str]:
    """Of mixed lengths."""
    return [f"{'Once upon a time. ' * (3 * number % 16)}Tell me about {TOPICS[number]}." for number in range(count)]


class Bench:
    """A swarm, the model in one piece, and how often to measure both."""

    def __init__(self, stack: ExitStack, arguments: argparse.Namespace) -> None:
        self._stack = stack.enter_context(ExitStack())
        self.tokens: int = arguments.tokens
        self.rounds: int = arguments.rounds
        self.dtype: WeightFormat = arguments.dtype
        self.stage_threads: int = arguments.stage_threads or arguments.threads
        self._swarm: LocalSwarm | None = None
        self._unsplit: Unsplit | None = None

    def swarm(self, stages: int) -> LocalSwarm:
        """A swarm whose model runs in so many stages; the one before ends, since idle workers take time, too."""
        if self._swarm is None or len(self._swarm.workers) != stages:
            self._stack.close()
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            swarm = self._swarm = self._stack.enter_context(LocalSwarm(folder, kv_tokens=KV_TOKENS))
            vram = vram_for(swarm, stages, self.dtype)
            for _ in range(stages):
                swarm.add_worker(vram, "--threads", str(self.stage_threads), "--dtype", self.dtype)
            swarm.wait_until_covered()
            answer = ask(swarm, PROMPT, WARM_TOKENS)
            assert answer.stages == stages, f"it runs through {answer.stages} stages"
        return self._swarm

    @property
    def unsplit(self) -> Unsplit:
        """transformers' own."""
        if self._unsplit is None:
            swarm = self._swarm or self.swarm(1)
            self._unsplit = Unsplit(swarm.folder / "coordinator", swarm.manifest, getattr(torch, self.dtype))
        return self._unsplit

    def medians(self, runs: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
        """What each gave in each round, by turns; the first round warms up and is not counted."""
        found: dict[str, list[Any]] = {name: [] for name in runs}
        for number in range(self.rounds + 1):
            for name, run in runs.items():
                result = run()
                if number:
                    found[name].append(result)
        return found


def middle(answers: list[Answer], figure: str) -> float:
    """The median of one figure."""
    return float(statistics.median(getattr(answer, figure) for answer in answers))


def one(bench: Bench) -> None:
    """1 job."""
    print(
        f"\n1 job, {bench.tokens} tokens; a hop is what a token takes beyond what all stages compute, for each of them"
    )
    print(f"{'':<12} {'TTFT ms':>8} {'tokens/s':>9} {'ratio':>6} {'p99 ms/token':>13} {'hop ms':>6} {'p99':>6}")
    for count in (1, 3, 6):
        through(bench, count)


def through(bench: Bench, count: int) -> None:
    """1 job through so many stages."""
    swarm = bench.swarm(count)
    mine = f"{count} stages"
    runs: dict[str, Callable[[], Answer]] = {
        "generate": lambda: bench.unsplit.generate(PROMPT, bench.tokens),
        mine: lambda: ask(swarm, PROMPT, bench.tokens),
    }
    found = bench.medians(runs)
    speed = middle(found["generate"], "rate")
    took = [hop for _ in range(bench.rounds) for hop in hops(swarm, bench.tokens)]
    for name, answers in found.items():
        rate, ttft = middle(answers, "rate"), middle(answers, "ttft")
        p99 = percentile([pause for answer in answers for pause in answer.pauses], 0.99)
        hop = [f"{percentile(took, share) * 1000:6.2f}" for share in (0.5, 0.99) if name == mine]
        print(f"{name:<12} {ttft * 1000:8.0f} {rate:9.1f} {rate / speed:6.2f} {p99 * 1000:13.1f}", *hop)


def percentile(values: list[float], share: float) -> float:
    """The value that so great a share of them do not exceed."""
    return sorted(values)[int(len(values) * share)]


def hops(swarm: LocalSwarm, tokens: int) -> list[float]:
    """Seconds of each hop for each token of an answer: what it took beyond what all stages computed, on average.

    The answer's prompt is computed too; so what a short answer to it takes is subtracted.
    """
    _, short = spent(swarm, WARM_TOKENS)
    answer, long = spent(swarm, WARM_TOKENS + tokens)
    compute = (long - short) / tokens
    return [(pause - compute) / answer.stages for pause in answer.pauses]


def spent(swarm: LocalSwarm, tokens: int) -> tuple[Answer, float]:
    """An answer, and the seconds for which stages computed it."""
    before = sum(seconds for seconds, _ in computed(swarm))
    answer = ask(swarm, PROMPT, tokens)
    return answer, sum(seconds for seconds, _ in computed(swarm)) - before


def many(bench: Bench) -> None:
    """16 jobs."""
    swarm, asked = bench.swarm(3), prompts(16)

    def together(tokens: list[int]) -> float:
        started = time.perf_counter()
        answers = ask_all(swarm, asked, tokens)
        return sum(len(each.times) for each in answers) / (max(each.times[-1] for each in answers) - started)

    alike = [bench.tokens] * 16
    mixed = [bench.tokens * share // 4 for share in (1, 2, 4, 8)] * 4
    found = bench.medians(
        {
            "1 job": lambda: ask(swarm, PROMPT, bench.tokens).rate_with_ttft,
            "16 jobs": lambda: together(alike),
            "static batch": lambda: bench.unsplit.static_batch(asked, alike),
            "continuous": lambda: bench.unsplit.continuous(asked, bench.tokens),
            "16 mixed jobs": lambda: together(mixed),
            "mixed static batch": lambda: bench.unsplit.static_batch(asked, mixed),
        }
    )
    middles = {name: statistics.median(values) for name, values in found.items()}
    print(f"\n16 jobs on 3 stages, {bench.tokens} tokens each, or a quarter, a half, all, twice of that where mixed;")
    print("all tokens per second, prompts included")
    for name, rate in middles.items():
        ours = middles["16 mixed jobs" if "mixed" in name else "16 jobs"]
        print(f"{name:<18} {rate:8.1f}   16 jobs are {ours / rate:5.2f} times that")


def busy(bench: Bench) -> None:
    """A long prompt among jobs that decode."""
    swarm = bench.swarm(3)
    long = "The quick brown fox jumps over the lazy dog. " * 102  # 1,024 tokens with the template
    quiet: list[float] = []
    disturbed: list[float] = []
    ttfts: dict[str, list[float]] = {"alone": [], "among 8": []}
    for number in range(bench.rounds + 1):
        alone = ask(swarm, long, 2).ttft
        answers: list[Answer] = []
        jobs = threading.Thread(target=lambda: answers.extend(ask_all(swarm, prompts(8), [4 * bench.tokens] * 8)))  # noqa: B023
        jobs.start()
        time.sleep(6)  # all of them decode now
        started = time.perf_counter()
        among = ask(swarm, long, 2)
        ended = started + among.ttft
        jobs.join()
        if number:
            ttfts["alone"].append(alone)
            ttfts["among 8"].append(among.ttft)
            for answer in answers:
                steps = list(zip(answer.times, answer.pauses, strict=False))
                disturbed += [pause for at, pause in steps if started <= at <= ended]
                quiet += [pause for at, pause in steps if at < started - 1 or at > ended + 1]
    first, second = statistics.median(ttfts["alone"]), statistics.median(ttfts["among 8"])
    before, during = (percentile(each, 0.99) * 1000 for each in (quiet, disturbed))
    print("\na prompt of 1,024 tokens while 8 jobs decode, 3 stages")
    print(f"TTFT alone {first * 1000:.0f} ms, among the jobs {second * 1000:.0f} ms: {second / first:.2f} times")
    print(f"the jobs' p99 per token {before:.0f} ms, during the prompt {during:.0f} ms: {during / before:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--stage-threads", type=int, help="of each stage, as they share the cores; --threads if omitted"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", default="one,many,busy")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    threads = f"{arguments.threads} threads, {arguments.stage_threads or arguments.threads} of each stage"
    print(f"SmolLM2-135M {arguments.dtype}, {threads}, {arguments.rounds} rounds")
    parts = {"one": one, "many": many, "busy": busy}
    with ExitStack() as stack:
        bench = Bench(stack, arguments)
        for name in arguments.only.split(","):
            parts[name](bench)


if __name__ == "__main__":
    main()
