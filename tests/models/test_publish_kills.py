"""Publishing from a hub, killed at random points and begun again: the same manifest, and nothing fetched twice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from azu.models.store import LayerStore
from tests.loopback_hub import LoopbackHub, sharded_llama

ROOT = Path(__file__).resolve().parents[2]
FILES = sharded_llama(n_layers=10, hidden=256)
SHARDS = sorted(name for name in FILES if name.endswith(".safetensors"))
WHOLE = sum(len(FILES[name]) for name in SHARDS)
PATIENCE_S = 60.0
# What a client that is killed had been sent and not yet written: its own buffers and both sockets'.
UNDER_WAY = 1 << 20  # bytes of one connection that the hub has sent and a killed client has not read
PROGRAM = """
import sys
from pathlib import Path
from azu.models.publish import publish
from azu.models.store import LayerStore
print(publish("me/tiny", LayerStore(Path(sys.argv[1]))).digest)
"""


class Publisher:
    """Publishes me/tiny in processes of its own."""

    def __init__(self, hub: LoopbackHub, folder: Path) -> None:
        self.store = LayerStore(folder / "store")
        self.cache = folder / "hf"
        self._environment = {**os.environ, **hub.environment(self.cache)}

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(self.store.root)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self._environment, cwd=ROOT)

    def publish(self) -> str:
        """The manifest's digest."""
        out, err = self.start().communicate(timeout=PATIENCE_S)
        assert not err
        return out.strip()

    def kill_once(self, reached: Callable[[], bool]) -> bool:
        """Kill a publishing process as soon as the condition holds; False where it was done before."""
        process = self.start()
        deadline = time.monotonic() + PATIENCE_S
        while not reached() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL

    def fetched(self) -> int:
        """How many bytes are in the hub's cache."""
        found = 0
        for path in self.cache.glob("hub/*/blobs/*"):
            try:
                found += path.stat().st_size
            except FileNotFoundError:  # renamed at this moment
                return 0
        return found


def test_killed_at_random_and_resumed(tmp_path: Path) -> None:
    chance = random.Random(1)
    with LoopbackHub() as hub:
        hub.add("me/tiny", FILES)
        undisturbed = Publisher(hub, tmp_path / "undisturbed").publish()
        hub.asked.clear()
        publisher = Publisher(hub, tmp_path)
        hub.rate = 20e6
        for share in sorted(chance.uniform(0.05, 0.95) for _ in range(3)):
            bound = share * WHOLE
            assert publisher.kill_once(lambda bound=bound: publisher.fetched() >= bound)  # type: ignore[misc]
        hub.rate = None
        in_a_cut = 0
        while in_a_cut < 2:
            stored = len(publisher.store.digests()) + chance.randint(1, 4)
            publisher.kill_once(lambda stored=stored: len(publisher.store.digests()) >= stored)  # type: ignore[misc]
            if list((publisher.store.root / "cutting").glob("*")):
                in_a_cut += 1
            else:  # it was done before the kill: from the start
                shutil.rmtree(publisher.store.root)
                publisher.store = LayerStore(publisher.store.root)
        assert publisher.publish() == undisturbed
        assert all(publisher.store.verify(digest) for digest in publisher.store.digests())
        assert sum(hub.sent(name) for name in SHARDS) <= WHOLE + 3 * UNDER_WAY
        assert any(asked.range_start for name in SHARDS for asked in hub.of(name))
