"""All workers of a swarm are restarted, one after the other, while clients go on asking: does a request fail?

    python -m benchmarks.rolling [--workers 6] [--clients 4] [--tokens 96] [--words 0] [--kill]

Real processes on this machine, with SmolLM2, of which each worker has a third. Each question is first asked
undisturbed. Then clients ask them again and again, as streams, while each worker in turn is told to leave
(`azu-node leave`), has ended, and is started again on its data folder; once the coordinator knows that it has layers
loaded, it is the next one's turn. With --kill workers are killed instead (SIGKILL), for comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

import httpx

from tests.local_swarm import LocalSwarm, Program, wait_until

VRAM = "440MiB"  # a third of the model
QUESTIONS = tuple(f"Tell me a story about {thing}." for thing in ("a fox", "the sea", "an old oak", "winter"))
PADDING = "The day was long and the road was dry, and nobody had come by since the morning. "  # of 16 words


@dataclass
class Asked:
    """One request, as its client saw it. held: stages whose pay is held, with the reason."""

    question: str
    text: str = ""
    fault: str = ""
    times: list[float] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    parts: int = 0  # workers that were paid for it


def ask(swarm: LocalSwarm, question: str, tokens: int) -> Asked:
    """Ask for a greedy answer, and read it to its end."""
    asked = Asked(question)
    request = {
        "model": swarm.model_id, "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    finish = None
    try:
        with httpx.stream("POST", f"{swarm.url}/v1/chat/completions", json=request, timeout=600) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    asked.fault = str(chunk["error"]["code"])
                for choice in chunk.get("choices", ()):
                    finish = choice["finish_reason"] or finish
                    if text := choice["delta"].get("content"):
                        asked.text += text
                        asked.times.append(time.perf_counter())
                for stage in (chunk.get("usage") or {}).get("azu", {}).get("stages", ()):
                    asked.parts += 1
                    asked.held += [stage["reason"]] if stage["state"] == "held" else []
            if response.status_code != 200:
                asked.fault = f"status {response.status_code}"
    except httpx.HTTPError as error:
        asked.fault = repr(error)
    if finish is None and not asked.fault:
        asked.fault = "the answer broke off"
    return asked


@dataclass
class Restart:
    """One worker's. Seconds until it had ended, and until it was back with its layers; its exit code."""

    ended_s: float
    back_s: float
    code: int


def restart(swarm: LocalSwarm, worker: Program, *, kill: bool) -> Restart:
    """Have a worker leave, and start it again."""
    started = time.perf_counter()
    if kill:
        worker.kill()
    else:
        leave = Program("leave", ["azu-node", "leave", "--data-dir", str(swarm.folder / worker.name)])
        assert leave.wait() == 0, leave.describe()
    code = worker.wait()
    ended = time.perf_counter()
    swarm.workers.remove(worker)
    swarm.add_worker(VRAM, name=worker.name).wait_for("stage ready")
    wait_until(lambda: swarm.health()["workers"] == len(swarm.workers), "the coordinator to know that it is back")
    return Restart(ended - started, time.perf_counter() - ended, code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--words", type=int, default=0, help="so many behind each question, to make prompts long")
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    questions = [f"{question} It goes on from here: {PADDING * (options.words // 16)}" for question in QUESTIONS]
    questions = questions if options.words else list(QUESTIONS)
    with tempfile.TemporaryDirectory() as folder, LocalSwarm(Path(folder)) as swarm:
        for _ in range(options.workers):
            swarm.add_worker(VRAM)
        for worker in swarm.workers:
            worker.wait_for("stage ready")
        swarm.wait_until_covered()
        undisturbed = {question: ask(swarm, question, options.tokens).text for question in questions}
        assert all(undisturbed.values()), "an answer without a token shows nothing"
        done, numbers = threading.Event(), count()

        def go_on_asking() -> list[Asked]:
            all_asked = []
            while not done.is_set():
                all_asked.append(ask(swarm, questions[next(numbers) % len(questions)], options.tokens))
            return all_asked

        with ThreadPoolExecutor(options.clients) as pool:
            clients = [pool.submit(go_on_asking) for _ in range(options.clients)]
            started = time.perf_counter()
            try:
                restarts = [restart(swarm, worker, kill=options.kill) for worker in list(swarm.workers)]
            finally:
                done.set()
            asked = [each for client in clients for each in client.result()]
        is_well = report(swarm, undisturbed, asked, restarts, time.perf_counter() - started)
    sys.exit(not is_well)


def report(
    swarm: LocalSwarm, undisturbed: dict[str, str], asked: list[Asked], restarts: list[Restart], taken: float
) -> bool:
    """Print what came of it; whether every request was answered."""
    failed = Counter(each.fault for each in asked if each.fault)
    whole = [each for each in asked if not each.fault]
    equal = sum(each.text == undisturbed[each.question] for each in whole)
    pauses = [later - earlier for each in whole for earlier, later in pairwise(each.times)]
    held = Counter(reason for each in whole for reason in each.held)
    coordinator = swarm.coordinator
    print(f"{len(restarts)} workers restarted in {taken:.0f} s; exit codes {sorted({each.code for each in restarts})}")
    print(f"until one had ended: median {statistics.median(each.ended_s for each in restarts):.1f} s, "
          f"longest {max(each.ended_s for each in restarts):.1f} s; until it was back: "
          f"median {statistics.median(each.back_s for each in restarts):.1f} s")  # fmt: skip
    print(f"requests: {len(asked)}, failed: {sum(failed.values())} {dict(failed) or ''}".rstrip())
    print(f"answers as undisturbed: {equal} of {len(whole)}")
    sent = [each for each in coordinator.found("KV caches handed over") if any(each["positions"].values())]
    resumed = [float(each["pause_s"]) for each in coordinator.found("job goes on")]
    print(
        f"jobs moved: {len(coordinator.found('job amended'))}, of which with their KV caches: {len(sent)}; "
        f"stages lost: {len(coordinator.found('stage lost'))}"
    )
    for reason, times in Counter(each["reason"].split(" ", 1)[-1] for each in coordinator.found("stage lost")).items():
        print(f"  lost: {reason} ({times})")
    if resumed:
        print(f"pauses of jobs that moved: median {statistics.median(resumed):.2f} s, longest {max(resumed):.2f} s")
    print(f"workers paid: {sum(each.parts for each in whole)}, of which held: {dict(held) or 0}")
    print(f"pauses between tokens: median {statistics.median(pauses):.3f} s, longest {max(pauses):.2f} s")
    return not failed


if __name__ == "__main__":
    main()
