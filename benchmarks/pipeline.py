"""Decode speed and TTFT of 1, 2 and 3 stages on loopback against transformers' generate in one process.

    python -m benchmarks.pipeline [--rounds 5] [--tokens 48] [--threads 2]

All runs of a round follow one another, the baseline first and last, so that what else the machine does hits each alike;
the figures are medians over the rounds, as ratios to the baseline's. The stages are real azu-node processes, asked
through the coordinator's HTTP endpoint with streaming; the baseline is transformers' generate() on the unsplit model
with the same weights, prompt, dtype (float32) and thread count. "3 in process" runs three stages one after the other in
this process: what it loses is the cut's own cost, and what "3 stages" loses beyond that is wire, wake-ups and HTTP.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import StoppingCriteria

from azu.distribution import Library
from azu.models.splice import StageSpec, stage_tensor_names
from azu.tickets import Sampling
from node.engine.stage import LoadedStage, Output, Step, find_device, load_stage
from tests.local_swarm import LocalSwarm
from tests.swarm.reference import Reference

PROMPT = "Tell me a long story about a fox, an owl and a very old oak tree."
# What each of 1, 2 or 3 workers has to offer so that the planner needs exactly that many.
VRAM = {1: "1500MiB", 2: "560MiB", 3: "440MiB"}


class Clock(StoppingCriteria):
    """Notes when generate() has each token; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def figures(started: float, times: list[float]) -> tuple[float, float]:
    """TTFT in seconds and decoded tokens per second."""
    return times[0] - started, (len(times) - 1) / (times[-1] - times[0])


def baseline(reference: Reference, tokens: int) -> tuple[float, float]:
    """One run of transformers' generate()."""
    clock = Clock()
    ids = torch.tensor([reference.prompt_ids(PROMPT)])
    started = time.perf_counter()
    with torch.inference_mode():
        reference.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=2, stopping_criteria=[clock],
        )  # fmt: skip
    return figures(started, clock.times)


def azu(swarm: LocalSwarm, client: httpx.Client, tokens: int) -> tuple[float, float]:
    """One streamed request."""
    request = {
        "model": swarm.model_id, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0,
        "max_tokens": tokens, "stream": True,
    }  # fmt: skip
    times: list[float] = []
    started = time.perf_counter()
    url = f"{swarm.url}/v1/chat/completions"
    with client.stream("POST", url, json=request, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())  # noqa: PERF401 - read as each line comes
    assert len(times) > tokens // 2, f"only {len(times)} pieces came"
    return figures(started, times)


def in_process_stages(swarm: LocalSwarm) -> list[LoadedStage]:
    """The three stages that the planner makes, loaded here."""
    library = Library(swarm.folder / "coordinator")
    manifest = dict(library.manifests())[swarm.manifest]
    config = json.loads(library.store.path(manifest.config.digest).read_bytes())
    device = find_device("cpu", None, torch.get_num_threads())
    stages = []
    for start, end in ((0, 10), (10, 20), (20, 30)):
        spec = StageSpec(config=config, start=start, end=end, n_layers=manifest.n_layers)
        blobs = manifest.blobs_for(start, end, stage_tensor_names(spec)[1])
        files = {name: library.store.path(blob.digest) for name, blob in blobs.items()}
        stages.append(load_stage(spec, "float32", device, files, vocab_size=manifest.vocab_size))
    return stages


def in_process(stages: list[LoadedStage], prompt: list[int], tokens: int) -> tuple[float, float]:
    """One greedy run through stages in this process."""
    jobs = [stage.open_job(Sampling()) for stage in stages]
    times: list[float] = []
    started = time.perf_counter()
    ids = tuple(prompt)
    while len(times) < tokens:
        inputs: tuple[int, ...] | bytearray = ids
        output = Output()
        for stage, job in zip(stages, jobs, strict=True):
            output = stage.run_steps([Step(job, inputs, len(ids), sample=True)])[0].unwrap()
            inputs = bytearray(output.body)
        assert output.token is not None
        ids = (output.token,)
        times.append(time.perf_counter())
    return figures(started, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client())
        swarms: dict[int, LocalSwarm] = {}
        for count, vram in VRAM.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            swarm = swarms[count] = stack.enter_context(LocalSwarm(folder))
            for _ in range(count):
                swarm.add_worker(vram, "--threads", str(arguments.threads))
            swarm.wait_until_covered()
        reference = Reference(swarms[1].folder / "coordinator", swarms[1].manifest)
        stages = in_process_stages(swarms[1])
        prompt = reference.prompt_ids(PROMPT)
        for round_number in range(arguments.rounds + 1):
            runs = {"generate": [baseline(reference, arguments.tokens)]}
            runs |= {f"{n} stage{'s' * (n > 1)}": [azu(swarm, client, arguments.tokens)] for n, swarm in swarms.items()}
            runs["3 in process"] = [in_process(stages, prompt, arguments.tokens)]
            runs["generate"].append(baseline(reference, arguments.tokens))
            if round_number:  # the first round warms up
                for name, measured in runs.items():
                    results.setdefault(name, []).extend(measured)
    report(results, arguments)


def report(results: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> None:
    """Print medians, and ratios to the baseline."""
    medians = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in results.items()
    }
    ttft, speed = medians["generate"]
    print(f"SmolLM2-135M float32, {arguments.threads} threads, {arguments.tokens} tokens, {arguments.rounds} rounds")
    print(f"{'':<13} {'TTFT ms':>8} {'ratio':>6} {'tokens/s':>9} {'ratio':>6}")
    for name, (first, rate) in medians.items():
        print(f"{name:<13} {first * 1000:8.0f} {first / ttft:6.2f} {rate:9.1f} {rate / speed:6.2f}")


if __name__ == "__main__":
    main()
