"""Jobs that run while one worker after the other breaks: how long they pause, whether any answer is another one, and
whether anybody computes what it had computed before.

    python -m benchmarks.chaos [--workers 6] [--jobs 20] [--every 5] [--tokens 64] [--failures 12] [--kinds ...]

Real processes on this machine, with SmolLM2, each in a network namespace of its own where that can be (Linux, root).
Each answer is first asked for undisturbed. Then all jobs are asked for at once, and every so many seconds a worker that
runs jobs is broken, in turn in one of these ways:

    kill   SIGKILL: its connections end
    stop   SIGSTOP, for good: it says nothing any more, and its kernel takes connections all the same
    cut    nothing comes through between it and the others (nftables); after 25 s everything does again
    pause  SIGSTOP for 25 s: longer than others wait for a sign of life, so that it comes back to jobs that it has lost
    slow   stopped for 45 of each 50 ms (only where --kinds names it)

Another worker is started in its place at once. Who is turned away because the model is not covered asks again, as the
error says: that job has not begun. A pause is what a client sees: from the last token before a failure to
the first after it, as the coordinator logs it. What stages compute is their own count of positions, times their layers,
against what the answers need without a failure and what the new workers have to compute for those that were lost.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from azu.errors import NetworkError
from node.status import fetch_status
from tests.local_swarm import LOOPBACK, LocalSwarm, Program, wait_until
from tests.netlab import Host, Lab, why_not

VRAM = "440MiB"  # a third of the model
LAYERS = 30
QUESTIONS = ("Tell me a story about {}.", "What is {}?", "Write a poem about {}.", "List five facts about {}.")
THINGS = ("a fox", "the sea", "an old oak", "winter", "a lighthouse")
KINDS = ("kill", "stop", "cut", "pause", "slow")
BACK_AFTER_S = 25.0
ASK_AGAIN_S, MOST_REFUSALS = 2.0, 200
STOPPED_S, RUNS_S = 0.045, 0.005
_CUT = """table inet cut {
    chain in { type filter hook input priority filter; iifname "eth0" drop; }
    chain out { type filter hook output priority filter; oifname "eth0" drop; }
}"""


class ChaosSwarm(LocalSwarm):
    """Each program in a network namespace of its own, where there is a laboratory."""

    def __init__(self, folder: Path, lab: Lab | None) -> None:
        super().__init__(folder)
        self._lab = lab
        self.hosts: dict[str, Host] = {}

    def start(self, name: str, *command: str) -> Program:
        if self._lab is None:
            return super().start(name, *command)
        host = self.hosts[name] = self._lab.public_host()
        options = ["--listen", LOOPBACK.replace("127.0.0.1", host.address), "--data-dir", str(self.folder / name)]
        program = Program(name, [*command, *options], prefix=host.command([]))
        self._programs.append(program)
        return program

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Have the calling thread where a program is, whose loopback it then sees."""
        with ExitStack() as stack:
            if name in self.hosts:
                stack.enter_context(self.hosts[name].entered())
            yield

    def health(self) -> dict[str, Any]:
        with self.at("coordinator"):
            return super().health()

    def status(self, worker: Program) -> dict[str, Any] | None:
        """What a worker tells its owner, if it answers."""
        try:
            with self.at(worker.name):
                return fetch_status(self.folder / worker.name)
        except NetworkError:
            return None


@dataclass(frozen=True)
class Answer:
    """A text, or why there is none; the positions that went through every layer for it; and how often it was asked for
    before it could begin.
    """

    text: str
    positions: int = 0
    turned_away: int = 0


def ask(swarm: ChaosSwarm, question: str, tokens: int) -> Answer:
    request = {
        "model": swarm.model_id, "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": tokens,
    }  # fmt: skip
    turned_away = 0
    while True:
        with swarm.at("coordinator"):
            answer = httpx.post(f"{swarm.url}/v1/chat/completions", json=request, timeout=1_200)
        body = answer.json()
        if answer.status_code == 200:
            text, used = str(body["choices"][0]["message"]["content"]), body["usage"]["total_tokens"]
            return Answer(text, used - 1, turned_away)
        code = str(body["error"]["code"])
        if code not in ("model_not_covered", "no_capacity") or turned_away == MOST_REFUSALS:
            return Answer(f"no answer: {code}")
        turned_away += 1
        time.sleep(ASK_AGAIN_S)


class Chaos:
    """Breaks workers of a swarm, and puts others in their place."""

    def __init__(self, swarm: ChaosSwarm, options: argparse.Namespace) -> None:
        self.broken: list[tuple[Program, str]] = []
        self._swarm = swarm
        self._options = options
        self._random = random.Random(options.seed)
        self._ended = threading.Event()
        self._helpers: list[threading.Thread] = []
        self._counts: dict[str, int] = {}  # token-layers, by worker
        self._all = [*swarm.workers]
        self._before = self._count()

    def run(self, done: threading.Event) -> None:
        """Until that is set, or enough is broken."""
        while len(self.broken) < self._options.failures and not done.wait(self._options.every):
            states = {worker: self._look(worker) for worker in self._swarm.workers}
            loaded = [worker for worker, state in states.items() if state and state["loaded"]]
            busy = [worker for worker in loaded if (states[worker] or {})["jobs"]["running"]]
            if loaded:
                kinds = self._options.kinds
                self._break(self._random.choice(busy or loaded), kinds[len(self.broken) % len(kinds)])
                self._all.append(self._swarm.add_worker(VRAM, name=f"substitute{len(self.broken)}"))

    def _break(self, worker: Program, kind: str) -> None:
        self._swarm.workers.remove(worker)
        self.broken.append((worker, kind))
        self._look(worker)
        if kind == "kill":
            worker.kill()
        elif kind == "cut":
            self._swarm.hosts[worker.name].run(["nft", "-f", "-"], _CUT)
            self._later(self._swarm.hosts[worker.name].run, ["nft", "delete", "table", "inet", "cut"])
        elif kind == "slow":
            self._helpers.append(threading.Thread(target=self._slow_down, args=(worker,)))
            self._helpers[-1].start()
        else:
            worker.process.send_signal(signal.SIGSTOP)
            if kind == "pause":
                self._later(worker.process.send_signal, signal.SIGCONT)

    def _later(self, call: Any, argument: Any) -> None:
        """Once it has been broken for long enough, or all is over."""

        def wait() -> None:
            self._ended.wait(BACK_AFTER_S)
            call(argument)

        self._helpers.append(threading.Thread(target=wait))
        self._helpers[-1].start()

    def _slow_down(self, worker: Program) -> None:
        while not self._ended.wait(RUNS_S):
            worker.process.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_S)
            worker.process.send_signal(signal.SIGCONT)

    def _look(self, worker: Program) -> dict[str, Any] | None:
        """A worker's status, with its count noted."""
        state = self._swarm.status(worker)
        if state:
            self._counts[worker.name] = int(state["since_start"]["token_layers"])
        return state

    def _count(self) -> int:
        for worker in self._all:
            if worker.process.poll() is None:
                self._look(worker)
        return sum(self._counts.values())

    def end(self) -> int:
        """Let everything go on that is stopped or cut off, and return the token-layers computed since the start."""
        self._ended.set()
        for helper in self._helpers:
            helper.join()
        for worker, kind in self.broken:
            if kind == "stop":
                worker.process.send_signal(signal.SIGCONT)
            if kind != "kill":
                wait_until(partial(self._look, worker), f"{worker.name} to answer")
        return self._count() - self._before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two failures")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--failures", type=int, default=12, help="the most")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:-1]))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        lab = None
        if (reason := why_not()) is None:
            lab = stack.enter_context(Lab())
        else:
            print(f"nobody is cut off. {reason}")
            options.kinds = [kind for kind in options.kinds if kind != "cut"] or ["kill"]
        swarm = stack.enter_context(ChaosSwarm(Path(folder), lab))
        sys.exit(run(swarm, options))


def run(swarm: ChaosSwarm, options: argparse.Namespace) -> int:
    """The exit code: 1 where an answer is another one."""
    questions = [QUESTIONS[n % 4].format(THINGS[n // 4 % 5]) for n in range(options.jobs)]
    for _ in range(options.workers):
        swarm.add_worker(VRAM)
    wait_until(lambda: all(worker.found("stage ready") for worker in swarm.workers), "all workers to load their layers")
    swarm.wait_until_covered()
    with ThreadPoolExecutor(options.jobs + 1) as pool:

        def answers() -> list[Answer]:
            return list(pool.map(lambda question: ask(swarm, question, options.tokens), questions))

        started = time.monotonic()
        undisturbed = answers()
        usual = time.monotonic() - started
        chaos, done = Chaos(swarm, options), threading.Event()
        breaking = pool.submit(chaos.run, done)
        started = time.monotonic()
        try:
            disturbed = answers()
            taken = time.monotonic() - started
        finally:
            done.set()
            breaking.result()
            computed = chaos.end()
    print(f"{len(chaos.broken)} workers broken in {taken:.0f} s; undisturbed it took {usual:.0f} s")
    return report(swarm, undisturbed, disturbed, computed)


def report(swarm: ChaosSwarm, undisturbed: list[Answer], disturbed: list[Answer], computed: int) -> int:
    """Print what came of it."""
    found = swarm.coordinator.found
    lost, slow, resumed = found("stage lost"), found("stage is slow"), found("job goes on")
    others = [(one.text, two.text) for one, two in zip(undisturbed, disturbed, strict=True) if one.text != two.text]
    print(f"stages lost: {len(lost)}, left because they were slow: {len(slow)}; pauses: {len(resumed)}")
    print(f"answers as undisturbed: {len(disturbed) - len(others)} of {len(disturbed)}")
    print(f"turned away before they could begin: {sum(bool(answer.turned_away) for answer in disturbed)}")
    for one, other in others:
        print(f"  another one: {other!r}, not {one!r}")
    if resumed:
        pauses = [float(each["pause_s"]) for each in resumed]
        print(f"a pause: median {statistics.median(pauses):.1f} s, longest {max(pauses):.1f} s")
    needed = LAYERS * sum(answer.positions for answer in disturbed)
    anew, again = (sum(int(each[name]) for each in resumed) for name in ("anew", "again"))
    print(f"token-layers: {needed} for the answers, {anew} by new workers, {again} again by those that stayed")
    print(f"counted by the workers: {computed}, {computed / (needed + anew):.3f} of the first two")
    return int(bool(others))


if __name__ == "__main__":
    main()
