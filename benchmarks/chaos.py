"""Jobs that run while one worker after the other dies: how long they pause, and whether any answer is another one.

    python -m benchmarks.chaos [--workers 6] [--jobs 20] [--every 5] [--tokens 64] [--failures 12]

Real processes on this machine, with SmolLM2. Each answer is first asked for undisturbed. Then all jobs are asked for
at once, and every so many seconds a worker is killed (SIGKILL), stopped for good (SIGSTOP), or stopped for 25 s and
let go on, in turn: that is longer than the others wait for a sign of life, so that it comes back to jobs which it has
lost. Another worker is started in its place at once. A pause is what a client sees: from the last token before a
failure to the first after it, as the coordinator logs it.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.local_swarm import LocalSwarm, Program

VRAM = "440MiB"  # a third of the model
QUESTIONS = ("Tell me a story about {}.", "What is {}?", "Write a poem about {}.", "List five facts about {}.")
THINGS = ("a fox", "the sea", "an old oak", "winter", "a lighthouse")
BACK_AFTER_S = 25.0


def ask(swarm: LocalSwarm, question: str, tokens: int) -> str:
    """The answer, or why there is none."""
    request = {
        "model": swarm.model_id, "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": tokens,
    }  # fmt: skip
    answer = httpx.post(f"{swarm.url}/v1/chat/completions", json=request, timeout=1_200)
    body = answer.json()
    if answer.status_code != 200:
        return f"no answer: {body['error']['code']}"
    return str(body["choices"][0]["message"]["content"])


class Chaos:
    """Breaks workers of a swarm, and puts others in their place."""

    def __init__(self, swarm: LocalSwarm, every: float, failures: int, seed: int) -> None:
        self.failures = 0
        self._swarm = swarm
        self._every = every
        self._most = failures
        self._random = random.Random(seed)
        self._broken: list[Program] = []
        self._timers: list[threading.Timer] = []

    def run(self, done: threading.Event) -> None:
        """Until that is set, or enough is broken."""
        while self.failures < self._most and not done.wait(self._every):
            running = [worker for worker in self._swarm.workers if worker.found("stage ready")]
            if not running:
                continue
            self._break(self._random.choice(running), self.failures % 3)
            self.failures += 1
            self._swarm.add_worker(VRAM, name=f"substitute{self.failures}")

    def _break(self, worker: Program, how: int) -> None:
        self._swarm.workers.remove(worker)
        self._broken.append(worker)
        if how == 0:
            worker.kill()
            return
        worker.process.send_signal(signal.SIGSTOP)
        if how == 2:
            self._timers.append(threading.Timer(BACK_AFTER_S, worker.process.send_signal, (signal.SIGCONT,)))
            self._timers[-1].start()

    def end(self) -> None:
        """Leave nothing behind that is stopped: it could not be asked to end."""
        for timer in self._timers:
            timer.cancel()
        for worker in self._broken:
            worker.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two failures")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--failures", type=int, default=12, help="the most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    questions = [QUESTIONS[n % 4].format(THINGS[n // 4 % 5]) for n in range(options.jobs)]
    with tempfile.TemporaryDirectory() as folder, LocalSwarm(Path(folder)) as swarm:
        for _ in range(options.workers):
            swarm.add_worker(VRAM)
        swarm.wait_until_covered()
        with ThreadPoolExecutor(options.jobs + 1) as pool:

            def answers() -> list[str]:
                return list(pool.map(lambda question: ask(swarm, question, options.tokens), questions))

            undisturbed = answers()
            chaos, done = Chaos(swarm, options.every, options.failures, options.seed), threading.Event()
            breaking = pool.submit(chaos.run, done)
            started = time.monotonic()
            try:
                disturbed = answers()
            finally:
                done.set()
                breaking.result()
                chaos.end()
            taken = time.monotonic() - started
        report(swarm, undisturbed, disturbed, chaos.failures, taken)


def report(swarm: LocalSwarm, undisturbed: list[str], disturbed: list[str], failures: int, taken: float) -> None:
    """Print what came of it."""
    equal = sum(one == other for one, other in zip(undisturbed, disturbed, strict=True))
    pauses = [float(each["pause_s"]) for each in swarm.coordinator.found("job goes on")]
    print(f"{failures} workers broken in {taken:.0f} s; stages lost: {len(swarm.coordinator.found('stage lost'))}")
    print(f"answers as undisturbed: {equal} of {len(disturbed)}")
    for one, other in zip(undisturbed, disturbed, strict=True):
        if one != other:
            print(f"  another one: {other!r}, not {one!r}")
    if pauses:
        print(f"pauses: {len(pauses)}, median {statistics.median(pauses):.1f} s, longest {max(pauses):.1f} s")


if __name__ == "__main__":
    main()
