"""MB/s of layer files from one peer and from three, against a plain HTTP download of the same bytes.

    python -m benchmarks.layers [--rounds 5] [--mib 384] [--file-mib 48]

All on loopback, each sender a process of its own. The runs of a round follow one another, and the figures are medians
over the rounds, as ratios to the same round's HTTP download: that is httpx streaming to disk, as huggingface_hub does,
with a SHA-256 and one fsync per file, from a server that sends with sendfile(2). Both hash every byte once. azu also
encrypts (Noise) and multiplexes (Yamux).

Where other programs use the machine, look at the CPU seconds too: whoever needs more of it also waits longer for it.
A first round warms everything up and does not count; in it, senders check their files once, as each process does.

While a peer sends, it also measures how late a task wakes up that sleeps 5 ms at a time: the longest stall of its event
loop is what a job's decode would have to wait for an upload.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import httpx
import psutil
import trio

from azu.distribution import LayerServer, Library, fetch_blobs
from azu.identity import Identity
from azu.models.manifest import Blob
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.wire.messages import LAYERS_PROTOCOL

PEERS = 3
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class SendfileHandler(http.server.SimpleHTTPRequestHandler):
    """What a good web server does with a file."""

    protocol_version = "HTTP/1.1"

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.wfile.flush()
        self.connection.sendfile(source)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Quiet."""


def serve_http(folder: Path) -> None:
    """Serve a folder until killed; the port is the only line on stdout."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(SendfileHandler, directory=str(folder)))
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


async def serve_layers(folder: Path) -> None:
    """Serve a library until stdin ends; a line on stdout says where, and one at the end how long the loop stalled."""
    identity = Identity(hashlib.sha256(str(folder).encode()).digest())
    longest = [0.0]
    async with open_overlay(OverlayConfig(identity.seed, LOOPBACK)) as overlay:
        overlay.handle(LAYERS_PROTOCOL, LayerServer(Library(folder)).handle)
        sys.stdout.write(json.dumps([overlay.peer_id, overlay.addrs]) + "\n")
        sys.stdout.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_loop, longest)
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()
    sys.stdout.write(f"{longest[0]}\n")


async def _watch_loop(longest: list[float]) -> None:
    while True:
        before = trio.current_time()
        await trio.sleep(0.005)
        longest[0] = max(longest[0], trio.current_time() - before - 0.005)


@dataclass
class Sender:
    """A sending process: its first line, and the longest stall in seconds of its event loop once it has ended."""

    process: psutil.Process
    line: str
    stall: float = 0.0


@contextmanager
def sender(kind: str, folder: Path) -> Iterator[Sender]:
    """Run a sending process."""
    command = [sys.executable, "-m", "benchmarks.layers", kind, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        output = cast(IO[str], process.stdout)
        try:
            started = Sender(psutil.Process(process.pid), output.readline())
            yield started
            if kind == "--serve-layers":
                cast(IO[str], process.stdin).close()
                started.stall = float(output.readline())
        finally:
            process.kill()


def make_files(folder: Path, total: int, size: int) -> list[Blob]:
    """Random layer files in a store, and the same bytes as links for the web server and the other peers."""
    store = Library(folder / "peer0").store
    blobs = [store.put_chunks(os.urandom(1 << 20) for _ in range(size)) for _ in range(total // size)]
    for number in range(1, PEERS):
        shutil.copytree(folder / "peer0", folder / f"peer{number}", copy_function=os.link)
    (folder / "http").mkdir()
    for blob in blobs:
        os.link(store.path(blob.digest), folder / "http" / blob.digest)
    return blobs


def download(url: str, folder: Path, hashes: Mapping[str, str]) -> None:
    """One file after the other, as huggingface_hub does within a process, each verified and on disk in the end."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        for name, expected in hashes.items():
            hasher = hashlib.sha256()
            with client.stream("GET", f"{url}/{name}") as response, (folder / name).open("wb") as file:
                for chunk in response.iter_bytes(1 << 20):
                    hasher.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            assert hasher.hexdigest() == expected, "wrong bytes"


async def fetch(overlay: Overlay, peers: Sequence[str], folder: Path, blobs: Sequence[Blob]) -> None:
    """The same with azu."""
    library = Library(folder)
    await fetch_blobs(overlay, library.store, blobs, peers=peers, offenders=library.offenders)
    assert all(library.store.has(blob.digest) for blob in blobs), "a file is missing"


@dataclass
class Run:
    """One download: its wall time, and the CPU time of receiver and senders together, in seconds."""

    wall: float
    cpu: float


class Clock:
    """Measures runs; `senders` are the processes whose CPU time counts besides this one's."""

    def __init__(self, senders: Sequence[psutil.Process]) -> None:
        self._processes = [psutil.Process(), *senders]
        self.runs: dict[str, list[Run]] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Note the run of the `with` block."""
        cpu, started = self._cpu(), time.perf_counter()
        yield
        self.runs.setdefault(kind, []).append(Run(time.perf_counter() - started, self._cpu() - cpu))

    def warm(self) -> dict[str, list[Run]]:
        """All runs but the first of each kind."""
        return {kind: runs[1:] for kind, runs in self.runs.items()}

    def _cpu(self) -> float:
        return sum(times.user + times.system for times in (each.cpu_times() for each in self._processes))


async def run(rounds: int, folder: Path, blobs: Sequence[Blob], url: str, peers: Sequence[str], clock: Clock) -> None:
    """All rounds; each download into a folder of its own, which is deleted after it."""
    identity = Identity.generate()
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "http").iterdir()}
    async with open_overlay(OverlayConfig(identity.seed, LOOPBACK)) as overlay:
        addresses = dict(json.loads(line) for line in peers)
        for peer_id, addrs in addresses.items():
            await overlay.connect(peer_id, addrs)
        for _ in range(rounds + 1):
            with tempfile.TemporaryDirectory(dir=folder) as empty, clock.measure("HTTP"):
                download(url, Path(empty), hashes)
            for count in (1, PEERS):
                kind = "1 peer" if count == 1 else f"{count} peers"
                with tempfile.TemporaryDirectory(dir=folder) as empty, clock.measure(kind):
                    await fetch(overlay, list(addresses)[:count], Path(empty), blobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=384, help="all files together")
    parser.add_argument("--file-mib", type=int, default=48, help="one file")
    parser.add_argument("--folder", type=Path, help="where to put them; the system's temporary folder where omitted")
    for kind in ("--serve-http", "--serve-layers"):
        parser.add_argument(kind, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_http:
        serve_http(arguments.serve_http)
    elif arguments.serve_layers:
        trio.run(serve_layers, arguments.serve_layers)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run all of it and print the table."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        blobs = make_files(folder, arguments.mib, arguments.file_mib)
        web = stack.enter_context(sender("--serve-http", folder / "http"))
        with ExitStack() as senders:
            peers = [senders.enter_context(sender("--serve-layers", folder / f"peer{n}")) for n in range(PEERS)]
            clock = Clock([each.process for each in (web, *peers)])
            url, lines = f"http://127.0.0.1:{web.line.strip()}", [peer.line for peer in peers]
            trio.run(run, arguments.rounds, folder, blobs, url, lines, clock)
        size = sum(blob.size for blob in blobs) / 1e6
        print(f"{size:.0f} MB in {len(blobs)} files, medians over {arguments.rounds} rounds")
        print("| | MB/s | ratio | of the rounds | CPU s/GB |\n| --- | --- | --- | --- | --- |")
        for kind, runs in clock.warm().items():
            ratios = [http.wall / own.wall for http, own in zip(clock.warm()["HTTP"], runs, strict=True)]
            rate = size / statistics.median(each.wall for each in runs)
            cpu = 1e3 / size * statistics.median(each.cpu for each in runs)
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {kind} | {rate:.0f} | {statistics.median(ratios):.2f} | {each} | {cpu:.1f} |")
        stalls = ", ".join(f"{1000 * peer.stall:.1f}" for peer in peers)
        print(f"longest stall of each sender's event loop: {stalls} ms")


if __name__ == "__main__":
    main()
