"""A coordinator that starts without a model and is given one over HTTP, as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from azu.errors import ModelError
from azu.models.store import LayerStore
from tests.local_swarm import LOOPBACK, Program, wait_until
from tests.loopback_hub import LoopbackHub, sharded_llama

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

FILES = sharded_llama()


class Swarm:
    """A bootstrap node and a hub; coordinators and workers as the test wants them."""

    def __init__(self, folder: Path, hub: LoopbackHub) -> None:
        self.folder = folder
        self.hub = hub
        self.env = {**os.environ, **hub.environment(folder / "hf")}
        self.programs: list[Program] = []
        bootstrap = self.start("bootstrap", "azu-bootstrap", "run")
        self.multiaddr = str(bootstrap.wait_for("bootstrap node ready")["addrs"][0])

    def start(self, name: str, *command: str) -> Program:
        options = ["--listen", LOOPBACK, "--data-dir", str(self.folder / name)]
        self.programs.append(Program(name, [*command, *options], self.env))
        return self.programs[-1]

    def coordinator(self) -> tuple[Program, httpx.Client]:
        program = self.start(
            "coordinator", "azu-coordinator", "serve", "--bootstrap", self.multiaddr, "--port", "0",
            "--payment-provider", "none",
        )  # fmt: skip
        url = str(program.wait_for("answering OpenAI clients")["url"]).removesuffix("/v1")
        token = (self.folder / "coordinator/admin-token").read_text().strip()
        return program, httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).with_name("azu-coordinator"))
        return subprocess.run(
            [program, *words, "--data-dir", str(self.folder / "coordinator")],
            env=self.env, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    with LoopbackHub() as hub:
        hub.add("me/tiny", FILES)
        made = Swarm(tmp_path, hub)
        try:
            yield made
        finally:
            for program in made.programs:
                if program.process.poll() is None:
                    program.stop()


def served(client: httpx.Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def holds_no_weights(store: LayerStore) -> bool:
    """Whether nothing but small files is left. One may be deleted as it is looked at."""
    try:
        return all(store.size(digest) < 20_000 for digest in store.digests())
    except ModelError:
        return False


def test_a_model_comes_and_goes_while_the_coordinator_runs(swarm: Swarm) -> None:
    coordinator, client = swarm.coordinator()
    assert (swarm.folder / "coordinator/admin-token").stat().st_mode & 0o777 == 0o600
    assert served(client) == []
    assert client.post("/models/shard", json={"model_id": "me/tiny"}).status_code == 202
    status = {"model_id": "me/tiny"}
    wait_until(lambda: client.get("/models/status", params=status).json()["state"] == "ready", "the model to be cut")
    wait_until(lambda: served(client) == ["me/tiny"], "the model to be served")
    worker = swarm.start(
        "worker", "azu-node", "join", swarm.multiaddr, "--vram", "512MiB", "--device", "cpu", "--threads", "1"
    )
    assert coordinator.wait_for("layers assigned")["model"] == "me/tiny"
    worker.wait_for("stage ready")
    wait_until(lambda: client.get("/healthz").status_code == 200, "coverage")

    # Another coordinator process serves it again, without having been told to.
    assert coordinator.stop() == 0
    client.close()
    coordinator, client = swarm.coordinator()
    assert served(client) == ["me/tiny"]

    # What the command changes the running coordinator takes up: here a new revision, and no model at all.
    commit = swarm.hub.add("me/tiny", {**FILES, "generation_config.json": b"{}"})
    swarm.command("shard", "me/tiny")
    wait_until(lambda: client.get("/models/status", params=status).json()["revision"] == commit, "the new revision")
    # The worker still has the layers of the old one loaded, and is given the new one's.
    assert coordinator.wait_for("layers assigned")["model"] == "me/tiny"
    assert swarm.command("remove", "me/tiny").stdout.startswith("removed me/tiny; the running coordinator")
    wait_until(lambda: served(client) == [], "the model to be gone")
    store = LayerStore(swarm.folder / "coordinator/layers")
    wait_until(lambda: holds_no_weights(store), "its files to be deleted")
    client.close()


def test_a_download_does_not_hold_up_the_end(swarm: Swarm) -> None:
    swarm.hub.rate = 20_000
    coordinator, client = swarm.coordinator()
    client.post("/models/shard", json={"model_id": "me/tiny"})
    wait_until(lambda: list(swarm.folder.rglob("*.incomplete")), "the download to begin")
    status = client.get("/models/status", params={"model_id": "me/tiny"}).json()
    assert status["state"] == "downloading"
    client.close()
    started = time.monotonic()
    coordinator.process.send_signal(signal.SIGTERM)
    assert coordinator.wait() == 0
    assert time.monotonic() - started < 15  # what is left of the download would take half a minute
