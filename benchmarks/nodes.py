"""Real nodes, several in one process, for benchmarks of a whole swarm."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from azu.distribution import LayerServer, Library
from azu.identity import Identity
from azu.joining import stay_joined
from azu.models.manifest import Blob, LayerCache, Manifest
from azu.overlay import Overlay, OverlayConfig, RelayLimits, open_overlay
from azu.peerbook import PeerBook
from azu.records import VALIDATORS, is_live, open_worker_record, worker_key
from node.engine.device import open_device_thread
from node.engine.hardware import Device
from node.trust import Trust
from node.worker import Worker

__all__ = ["LOOPBACK", "NodeProcess", "model"]

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
_DEVICE = Device("cpu", "CPU", 1 << 30, "float32")


def model(number: int) -> Manifest:
    """A made-up model, of which workers can hold the layer though nobody could run it."""
    return Manifest(
        model_id=f"benchmarks/{number}", revision="main", origin="", architecture="LlamaForCausalLM", dtype="float16",
        n_layers=1, hidden_size=32, vocab_size=64, context_length=128, config=_blob(b"{}"), tokenizer={},
        layers=(_blob(_layer(number)),), caches=(LayerCache(32),), shared={}, sources={}, tied=False,
    )  # fmt: skip


def _layer(number: int) -> bytes:
    return b"layer of model %d" % number


def _blob(data: bytes) -> Blob:
    return Blob(hashlib.sha256(data).hexdigest(), len(data))


class NodeProcess:
    """The nodes in this process; what a benchmark asks a `benchmarks.processes.Process` for. Times are in seconds."""

    def __init__(self, nursery: trio.Nursery, folder: Path, bootstrap: Sequence[str]) -> None:
        self._nursery = nursery
        self._folder = folder
        self._bootstrap = bootstrap
        self._overlays: dict[str, Overlay] = {}
        self._running: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

    async def join(self, held: int | None) -> tuple[str, float]:
        """Start a node: its peer id, and after how long it has joined. With a model's number it is a worker that has
        that model's layer on its disk.
        """
        started = trio.current_time()
        peer_id: str = await self._nursery.start(self._run, Identity.generate(), held)
        return peer_id, trio.current_time() - started

    async def found(self) -> tuple[str, ...]:
        """Start a swarm's first node, which relays as a bootstrap node does: its addresses."""
        config = OverlayConfig(Identity.generate().seed, LOOPBACK, validators=VALIDATORS, relay=RelayLimits())

        async def run(task_status: trio.TaskStatus[tuple[str, ...]]) -> None:
            async with open_overlay(config) as overlay:
                task_status.started(overlay.addrs)
                await trio.sleep_forever()

        addresses: tuple[str, ...] = await self._nursery.start(run)
        return addresses

    async def leave(self, peer_id: str) -> None:
        """Stop a node as SIGTERM would."""
        scope, ended = self._running.pop(peer_id)
        scope.cancel()
        await ended.wait()

    async def record(self, asker: str, target: str) -> tuple[str, float]:
        """Look up a worker's record: what is wrong with it, if anything, and how long that took."""
        started = trio.current_time()
        value = await self._overlays[asker].get_record(worker_key(target))
        seconds = trio.current_time() - started
        if value is None:
            return "not found", seconds
        return "" if is_live(open_worker_record(value), time.time()) else "expired", seconds

    async def providers(self, asker: str, key: bytes) -> tuple[str, ...]:
        """Who announced a key."""
        return await self._overlays[asker].providers(key)

    async def trace(self, asker: str, key: bytes) -> tuple[int, int, float]:
        """Look for the peers closest to a key: hops to the closest, peers asked, how long it took."""
        started = trio.current_time()
        trace = await self._overlays[asker].trace(key)
        seconds = trio.current_time() - started
        named_by = {hop.peer_id: hop.named_by for hop in trace.hops}
        hops, peer = 0, trace.closest[0] if trace.closest else None
        while peer is not None:
            hops, peer = hops + 1, named_by[peer]
        return hops, len(trace.hops), seconds

    async def _run(self, identity: Identity, held: int | None, task_status: trio.TaskStatus[str]) -> None:
        peer_id, ended = identity.peer_id, trio.Event()
        try:
            with trio.CancelScope() as scope:
                self._running[peer_id] = scope, ended
                config = OverlayConfig(identity.seed, LOOPBACK, validators=VALIDATORS)
                async with open_overlay(config) as overlay, trio.open_nursery() as nursery:
                    self._overlays[peer_id] = overlay
                    if held is not None:
                        nursery.start_soon(self._work, identity, overlay, held)
                    book = PeerBook(self._folder / peer_id / "peers.json")
                    await nursery.start(partial(stay_joined, overlay, self._bootstrap, book=book))
                    task_status.started(peer_id)
        finally:
            self._overlays.pop(peer_id, None)
            ended.set()

    async def _work(self, identity: Identity, overlay: Overlay, held: int) -> None:
        """What `node.service.serve` does, on a device that computes nothing."""
        library = Library(self._folder / identity.peer_id)
        library.publish(identity, model(held))
        library.store.put_bytes(_layer(held))
        async with open_device_thread() as thread:
            await Worker(
                identity, overlay, thread, _DEVICE, library, LayerServer(library), dtype="float32", trust=Trust(()),
                payout_address="",
            ).run()  # fmt: skip
