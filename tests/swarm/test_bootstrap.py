"""A swarm whose bootstrap node dies: answers go on, nodes find each other, and newcomers wait for its return."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from openai import OpenAI

from azu.peerbook import PeerBook
from tests.local_swarm import LocalSwarm, Program, wait_until
from tests.swarm.conftest import WORKER_VRAM

pytestmark = [pytest.mark.swarm, pytest.mark.slow]


@pytest.mark.timeout(600)
def test_bootstrap_nodes_may_die_and_come_back(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path) as swarm:
        for _ in range(3):
            swarm.add_worker(WORKER_VRAM)
        swarm.wait_until_covered()
        for worker in swarm.workers:
            book = tmp_path / worker.name / "peers.json"
            wait_until(lambda book=book: len(PeerBook(book)) >= 2, f"{worker.name} to remember peers")
        expected = Asking(swarm).text()
        assert len(expected) > 100

        first, second = swarm.bootstrap, start_second(swarm)
        second.wait_for("joined the swarm")
        running = Asking(swarm)
        wait_until(lambda: running.pieces, "the first token")
        first.kill()
        first = start_again(swarm)
        second.kill()
        second = start_second(swarm)
        first.kill()
        second.kill()
        assert running.text() == expected, "the answer changed when the bootstrap nodes died"

        # A worker that starts again finds the others by itself.
        swarm.workers[0].kill()
        again = swarm.add_worker(WORKER_VRAM, name="worker1")
        again.wait_for("trying remembered peers")
        again.wait_for("joined the swarm")
        again.wait_for("stage ready")
        swarm.wait_until_covered()
        assert expected.startswith(Asking(swarm, tokens=16).text())

        # Its address is the same after a restart, which who waits for it sees.
        newcomer = swarm.add_worker(WORKER_VRAM, name="newcomer")
        newcomer.wait_for("cannot join yet")
        start_again(swarm)
        newcomer.wait_for("joined the swarm")


def start_again(swarm: LocalSwarm) -> Program:
    """Start the swarm's bootstrap node at the address that it had."""
    program = swarm.start("bootstrap", "azu-bootstrap", "run", "--listen", swarm.multiaddr.split("/p2p/")[0])
    assert swarm.multiaddr in program.wait_for("bootstrap node ready")["addrs"]
    return program


def start_second(swarm: LocalSwarm) -> Program:
    """Start another bootstrap node, which knows the first."""
    program = swarm.start("bootstrap2", "azu-bootstrap", "run", "--bootstrap", swarm.multiaddr, "--no-port-mapping")
    program.wait_for("bootstrap node ready")
    program.wait_for("port mapping is switched off: the router is not asked for a port")
    return program


class Asking(threading.Thread):
    """A streamed answer on its way."""

    def __init__(self, swarm: LocalSwarm, tokens: int = 160) -> None:
        super().__init__()
        self._swarm = swarm
        self._tokens = tokens
        self.pieces: list[str] = []
        self.start()

    def run(self) -> None:
        client = OpenAI(base_url=f"{self._swarm.url}/v1", api_key="none", max_retries=0, timeout=240)
        stream = client.chat.completions.create(
            model=self._swarm.model_id,
            messages=[{"role": "user", "content": "Tell me about the sea."}],
            temperature=0,
            max_tokens=self._tokens,
            stream=True,
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                self.pieces.append(chunk.choices[0].delta.content)

    def text(self) -> str:
        self.join(240)
        assert not self.is_alive()
        return "".join(self.pieces)
