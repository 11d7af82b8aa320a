"""The three-stage pipeline, through the real processes and the official client, against the unsplit model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.local_swarm import LocalSwarm, Program, wait_until
from tests.swarm.reference import Reference

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

TEXT = "the quick brown fox jumps over the lazy dog while seven wise owls watch from an old oak tree and count to "
WORDS = TEXT.split()

QUESTIONS = [
    "What is the capital of France?",
    "Hi",
    "2+2=",
    "Name three colours.",
    "Écris une phrase en français.",
    "数を三つ挙げてください。",
    "Write a haiku about autumn rain.",
    "Who wrote Hamlet, and when?",
    "What is 123456789 times 2?",
    "Explain gravity to a child in one sentence.",
    "def fibonacci(n):\n    ",
    "🦊🐻🐼 Which animals are these?",
    *(f"Repeat the last word of this text: {' '.join((WORDS * 40)[:length])}" for length in (20, 50, 100, 200, 300)),
    *(f"Summarise: {' '.join((WORDS * 40)[:length])}" for length in (260, 500, 800)),
]


def test_greedy_answers_equal_the_unsplit_models(ask: Any, reference: Reference) -> None:
    assert len(QUESTIONS) == 20
    lengths = {len(reference.prompt_ids(question)) for question in QUESTIONS}
    assert min(lengths) < 40
    assert max(lengths) > 2 * 256  # prompts of one chunk and of several
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, QUESTIONS))
    for question, (answer, finish, usage) in zip(QUESTIONS, answers, strict=True):
        text, ids = reference.ask(question)
        assert (answer, finish) == (text, "stop" if ids[-1] == 2 else "length"), question
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(reference.prompt_ids(question)), len(ids))


def test_eight_jobs_at_once_answer_as_each_would_alone(ask: Any, reference: Reference) -> None:
    questions = QUESTIONS[5:13]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(ask, questions))
    for question, (answer, _, usage) in zip(questions, answers, strict=True):
        text, ids = reference.ask(question)
        assert answer == text, question
        assert usage.completion_tokens == len(ids)


def test_every_stage_is_a_different_worker_and_is_paid_for_its_own_layers(ask: Any, swarm: LocalSwarm) -> None:
    answer, finish, usage = ask("What is the capital of France?")
    assert (answer, finish) == ("The capital of France is Paris.", "stop")
    azu = usage.model_extra["azu"]
    positions = usage.prompt_tokens + usage.completion_tokens - 1
    assert azu["token_layers"] == 30 * positions
    assert azu["cost"] == 2 * azu["token_layers"]
    layers = [layer for stage in azu["stages"] for layer in range(*stage["layers"])]
    assert layers == list(range(30))
    assert {stage["peer_id"] for stage in azu["stages"]} == {
        worker.found("worker starting")[0]["peer"] for worker in swarm.workers
    }
    for stage in azu["stages"]:
        count = stage["layers"][1] - stage["layers"][0]
        assert count <= 12
        assert stage["state"] == "credited"
        assert stage["token_layers"] == count * positions
        assert stage["earned"] == 2 * count * positions * 80 // 100


def test_streaming_gives_the_same_text_piece_by_piece(client: OpenAI, swarm: LocalSwarm, reference: Reference) -> None:
    stream = client.chat.completions.create(
        model=swarm.model_id,
        messages=[{"role": "user", "content": QUESTIONS[5]}],
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == reference.ask(QUESTIONS[5])[0]
    assert sum(map(bool, pieces)) > 3
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(reference.ask(QUESTIONS[5])[1])


def test_a_seed_repeats_a_sampled_answer(client: OpenAI, swarm: LocalSwarm) -> None:
    def sample(seed: int, **more: Any) -> str:
        answer = client.chat.completions.create(
            model=swarm.model_id,
            messages=[{"role": "user", "content": "Invent a name for a boat."}],
            temperature=1.0,
            top_p=0.95,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            max_tokens=16,
            seed=seed,
            extra_body={"top_k": 50, "min_p": 0.02, "repetition_penalty": 1.1, **more},
        )
        return answer.choices[0].message.content or ""

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(8, 14)}) > 1


def test_a_stop_string_ends_the_job_early(client: OpenAI, swarm: LocalSwarm) -> None:
    answer = client.chat.completions.create(
        model=swarm.model_id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=24,
        stop=[" is"],
    )
    assert answer.choices[0].message.content == "The capital of France"
    assert answer.choices[0].finish_reason == "stop"


def test_each_worker_stays_well_under_the_unsplit_models_memory(swarm: LocalSwarm) -> None:
    command = [sys.executable, "-m", "node.engine.footprint", str(swarm.folder / "coordinator"), swarm.manifest]
    unsplit = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["resident_bytes"]
    for worker in swarm.workers:
        assert psutil.Process(worker.process.pid).memory_info().rss < 0.85 * unsplit


def test_each_worker_counts_what_went_through_it(ask: Any, swarm: LocalSwarm) -> None:
    before = [metrics_of(swarm, worker) for worker in swarm.workers]
    _, _, usage = ask(QUESTIONS[18])  # a prompt of several chunks
    steps = -(-usage.prompt_tokens // 256) + usage.completion_tokens - 1
    rows = usage.prompt_tokens + usage.completion_tokens - 1
    sent = []
    for worker, earlier in zip(swarm.workers, before, strict=True):
        now = metrics_of(swarm, worker)
        grown = {name: now[name] - earlier[name] for name in now if "_total" in name}
        assert (grown["azu_pass_rows_total"], grown["azu_pass_steps_total"], grown["azu_passes_total"]) == (
            rows,
            steps,
            steps,
        )
        assert grown["azu_jobs_admitted_total"] == 1
        assert grown["azu_pass_compute_seconds_total"] > 0
        assert (now["azu_jobs_running"], now["azu_kv_tokens_reserved"]) == (0, 0)
        assert all(count >= 0 for count in grown.values())
        sent.append((grown["azu_ring_sent_bytes_total"], grown["azu_ring_received_bytes_total"]))
    tensor = rows * 576 * 4
    assert sorted(sent) == [(0, tensor), (tensor, 0), (tensor, tensor)]


def test_azu_node_status_says_what_a_worker_does(ask: Any, swarm: LocalSwarm) -> None:
    ask("Hi")
    for worker in swarm.workers:
        wait_until(
            lambda worker=worker: not metrics_of(swarm, worker)["azu_jobs_running"], "jobs of other tests to end"
        )
        page = status(swarm, worker)
        assert page.startswith(worker.found("worker starting")[0]["peer"])
        layers = worker.found("stage ready")[-1]["layers"]
        assert f"  layers    {layers} of SmolLM2-135M-Instruct, " in page
        assert "  reach     in this network" in page
        assert re.search(r"\n  event loop's longest stall +\d+\.\d\d ms +\d+\.\d\d ms\n", page)

    def both() -> tuple[dict[str, Any], dict[str, float]] | None:
        told, seen = json.loads(status(swarm, swarm.workers[0], "--json")), metrics_of(swarm, swarm.workers[0])
        return (told, seen) if told["since_start"]["rows"] == seen["azu_pass_rows_total"] else None

    told, seen = wait_until(both, "a moment in which no job moves")
    assert told["since_start"]["passes"] >= told["last_minute"]["passes"] > 0
    assert told["kv_tokens"]["all"] == seen["azu_kv_tokens"] == swarm.workers[0].found("stage ready")[-1]["kv_tokens"]


def metrics_of(swarm: LocalSwarm, worker: Program) -> dict[str, float]:
    """What a Prometheus would scrape; every line has to be one that it reads."""
    url = json.loads((swarm.folder / worker.name / "status.json").read_text())["url"]
    with urllib.request.urlopen(f"{url}/metrics") as response:  # noqa: S310 - our own loopback URL
        lines = response.read().decode().splitlines()
    samples = [
        re.fullmatch(r'(azu_[a-z_]+(?:\{[a-z]+="[^"\\]*"\})?) (-?[0-9.e+-]+)', line) for line in lines if line[0] != "#"
    ]
    return {match[1]: float(match[2]) for match in samples if match is not None or pytest.fail("\n".join(lines))}


def status(swarm: LocalSwarm, worker: Program, *options: str) -> str:
    command = [Path(sys.executable).with_name("azu-node"), "status", "--data-dir", swarm.folder / worker.name, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
