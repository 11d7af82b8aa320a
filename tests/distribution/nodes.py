"""Real nodes on loopback that hold layer files and hand them out."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from azu.channel import Channel
from azu.distribution import FetchProgress, LayerServer, Library, Patience, fetch_blobs
from azu.identity import Identity
from azu.models.manifest import PIECE_BYTES, Blob, LayerCache, Manifest
from azu.models.pieces import PieceHasher
from azu.overlay import Overlay, OverlayConfig, OverlayStream, open_overlay
from azu.records import VALIDATORS
from azu.wire.messages import LAYERS, LAYERS_PROTOCOL, BlobRange, GetBlob

LIMIT = 60.0  # seconds; only keeps a hung test from hanging the run
PUBLISHER, ME, FIRST, SECOND, THIRD = (Identity(bytes([number]) * 32) for number in range(1, 6))

BIG = hashlib.shake_256(b"big").digest(3 * PIECE_BYTES + 12_345)  # four pieces
SMALL = b"a small file"
EMPTY = b""
# Errors come soon in a test that waits for one; whoever answers at all answers within a second.
SOON = Patience(refresh=0.2, stall=2.0, piece=5.0, retry=0.1, busy=0.2, fallback=0.3, give_up=0.7)


def blob_of(data: bytes) -> Blob:
    hasher = PieceHasher()
    hasher.update(data)
    pieces = hashlib.sha256(hasher.piece_list).hexdigest() if len(data) > PIECE_BYTES else ""
    return Blob(hasher.digest, len(data), pieces)


def piece_list_of(data: bytes) -> bytes:
    hasher = PieceHasher()
    hasher.update(data)
    return hasher.piece_list


def manifest_of(*layers: bytes, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "model_id": "owner/tiny", "revision": "main", "origin": "", "architecture": "LlamaForCausalLM",
        "dtype": "float16", "n_layers": len(layers), "hidden_size": 32, "vocab_size": 64, "context_length": 128,
        "config": blob_of(b"{}"), "tokenizer": {}, "layers": tuple(blob_of(data) for data in layers),
        "caches": (LayerCache(32),) * len(layers), "shared": {}, "sources": {}, "tied": False,
    }  # fmt: skip
    return Manifest(**fields | changes)


@dataclass
class Node:
    overlay: Overlay
    library: Library

    @property
    def peer_id(self) -> str:
        return self.overlay.peer_id

    @property
    def store_root(self) -> Path:
        return self.library.store.root


@asynccontextmanager
async def opened(identity: Identity, folder: Path, *files: bytes, **limits: Any) -> AsyncIterator[Node]:
    """A node with files; `limits` are those of its LayerServer."""
    library = Library(folder / identity.peer_id)
    for data in files:
        library.store.put_bytes(data)
    config = OverlayConfig(identity.seed, ("/ip4/127.0.0.1/tcp/0",), validators=VALIDATORS)
    async with open_overlay(config) as overlay:
        overlay.handle(LAYERS_PROTOCOL, LayerServer(library, **limits).handle)
        yield Node(overlay, library)


Nodes = tuple[Node, Node, Node]


@asynccontextmanager
async def all_opened(folder: Path, *identities: Identity) -> AsyncIterator[list[Node]]:
    """Nodes that are opened and, which takes each half a second, closed together."""
    async with trio.open_nursery() as nursery:
        nodes: list[Node] = [await nursery.start(_keep_open, identity, folder) for identity in identities]
        with trio.fail_after(LIMIT):
            yield nodes
        nursery.cancel_scope.cancel()


async def _keep_open(identity: Identity, folder: Path, task_status: trio.TaskStatus[Node]) -> None:
    async with opened(identity, folder) as node:
        task_status.started(node)
        await trio.sleep_forever()


async def fetch(me: Node, holders: Sequence[Node], *files: bytes, **options: Any) -> FetchProgress:
    """Fetch files, with their fate in what is returned; `options` are those of `fetch_blobs`."""
    progress = FetchProgress()
    defaults: dict[str, Any] = {"peers": [holder.peer_id for holder in holders], "patience": SOON, "progress": progress}
    defaults["offenders"] = me.library.offenders
    await fetch_blobs(me.overlay, me.library.store, [blob_of(data) for data in files], **defaults | options)
    return progress


def assert_has(node: Node, *files: bytes) -> None:
    for data in files:
        assert node.library.store.path(blob_of(data).digest).read_bytes() == data
    assert not list((node.store_root / "partial").iterdir())


def served_by(
    node: Node, answer: Callable[[Channel, GetBlob], Awaitable[None]], piece_list: bytes = piece_list_of(BIG)
) -> None:
    """Let a node answer what it has truthfully, and requests for anything but that piece list as `answer` does."""
    server = LayerServer(node.library)
    lists = {blob_of(piece_list).digest}

    async def handle(stream: OverlayStream) -> None:
        channel = Channel(stream, LAYERS)
        while (received := await channel.receive()) is not None:
            request, body = received
            if isinstance(request, GetBlob) and request.digest not in lists:
                await answer(channel, request)
            else:
                await server._answer(stream, channel, request, body)

    node.overlay.handle(LAYERS_PROTOCOL, handle)


async def send_truly(node: Node, channel: Channel, request: GetBlob, *, flip: int | None = None) -> None:
    """Send a range; with one bit of its byte `flip` turned over, where given."""
    data = bytearray(node.library.store.read(request.digest, request.offset, request.length))
    if flip is not None:
        data[flip] ^= 1
    await channel.send(BlobRange(), data)
