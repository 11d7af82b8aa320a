"""The whole swarm over home routers: real programs in network namespaces, a prompt in, the model's answer out."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.local_swarm import PATIENCE_S, Program, smollm2_path, wait_until
from tests.netlab import Home, Host, Lab, Nat, laboratory

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

lab = pytest.fixture(laboratory)

# Enough for 20 of SmolLM2's 30 layers: it takes two workers, and they need each other.
WORKER_VRAM = "420MiB"
LISTEN = "/ip4/0.0.0.0/tcp/4001"


class HomeSwarm:
    """Two bootstrap nodes and a coordinator on the internet, and a worker in each of two homes."""

    def __init__(self, lab: Lab, folder: Path, nat: Nat) -> None:
        self.lab, self.folder = lab, folder
        self.programs: list[Program] = []
        self.relays = [lab.public_host(), lab.public_host()]
        bootstrap: list[str] = []
        for number, host in enumerate(self.relays):
            joining = [word for each in bootstrap for word in ("--bootstrap", each)]
            program = self.start(host, f"bootstrap{number}", "azu-bootstrap", "run", *joining)
            told = program.wait_for("bootstrap node ready")["addrs"]
            bootstrap.append(next(each for each in told if host.address in each))
        self.host = lab.public_host()
        options = [word for each in bootstrap for word in ("--bootstrap", each)]
        command = ["azu-coordinator", "serve", "--model", str(smollm2_path()), "--port", "0", "--kv-tokens", "512"]
        command += ["--payment-provider", "none"]
        self.coordinator = self.start(self.host, "coordinator", *command, *options)
        self.homes = [lab.home(nat), lab.home(nat)]
        self.workers = [self._worker(number, home, bootstrap) for number, home in enumerate(self.homes)]
        self.url = str(self.coordinator.wait_for("answering OpenAI clients")["url"]).removesuffix("/v1")
        self.model = str(self.coordinator.wait_for("model published")["model"])
        wait_until(self._covered, "coverage")

    def _covered(self) -> bool:
        assert all(program.process.poll() is None for program in self.programs), self.describe()
        return bool(self._get("/healthz")["models"][0]["covered"])

    def start(self, host: Host, name: str, *command: str) -> Program:
        options = ["--listen", LISTEN, "--data-dir", str(self.folder / name)]
        program = Program(name, [*command, *options], prefix=host.command([]))
        self.programs.append(program)
        return program

    def _worker(self, number: int, home: Home, bootstrap: list[str]) -> Program:
        options = ["--vram", WORKER_VRAM, "--device", "cpu", "--threads", "1"]
        return self.start(home.hosts[0], f"worker{number}", "azu-node", "join", *bootstrap, *options)

    def ask(self, question: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        answer = self._get("/v1/chat/completions", {**body, "max_tokens": 16})
        return str(answer["choices"][0]["message"]["content"])

    def _get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})  # noqa: S310
        with self.host.entered():
            try:
                response = urllib.request.urlopen(request, timeout=PATIENCE_S)  # noqa: S310 - our own loopback URL
            except urllib.error.HTTPError as error:
                response = error
            with response:
                return json.loads(response.read())

    def reaches(self) -> list[str]:
        """How each worker says others reach it."""
        return [worker.found("how others reach this node")[-1]["reach"] for worker in self.workers]

    def through_relays(self) -> int:
        """Bytes between the homes and the bootstrap nodes so far."""
        pairs = [(home.router, relay) for home in self.homes for relay in self.relays]
        return sum(self.lab.bytes_between(*pair) for pair in pairs)

    def between_homes(self) -> int:
        """Bytes between the two homes so far."""
        return self.lab.bytes_between(self.homes[0].router, self.homes[1].router)

    def describe(self) -> str:
        return "\n".join(program.describe() for program in self.programs)


@contextmanager
def home_swarm(lab: Lab, folder: Path, nat: Nat) -> Iterator[HomeSwarm]:
    swarm = HomeSwarm.__new__(HomeSwarm)
    swarm.programs = []
    try:
        swarm.__init__(lab, folder, nat)  # type: ignore[misc]  # what it has started must end, however far it came
        yield swarm
    finally:
        for program in swarm.programs:
            program.process.terminate()
        for program in swarm.programs:
            program.wait()


def test_stages_in_two_homes_behind_port_restricted_routers_connect_directly(lab: Lab, tmp_path: Path) -> None:
    with home_swarm(lab, tmp_path, "port-restricted") as swarm:
        assert "Paris" in swarm.ask("What is the capital of France?"), swarm.describe()
        direct, relayed = swarm.between_homes(), swarm.through_relays()
        assert "Paris" in swarm.ask("What is the capital of France?")
        assert all(reach.startswith("by hole punching") for reach in swarm.reaches())
        direct, relayed = swarm.between_homes() - direct, swarm.through_relays() - relayed
        assert direct > 20_000, "no activations went from home to home"
        assert relayed < direct / 2, "the relay carried activations"


def test_stages_in_two_homes_behind_symmetric_routers_use_the_relay(lab: Lab, tmp_path: Path) -> None:
    with home_swarm(lab, tmp_path, "symmetric") as swarm:
        before = swarm.through_relays()
        assert "Paris" in swarm.ask("What is the capital of France?"), swarm.describe()
        assert all(reach.startswith("through relays only") for reach in swarm.reaches())
        assert swarm.through_relays() - before > 20_000
        assert swarm.between_homes() < 10_000
