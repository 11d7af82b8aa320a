"""Real nodes on loopback that hold layer files and hand them out."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from azu.distribution import Library, fetch_blobs, serve_layers
from azu.identity import Identity
from azu.models.manifest import PIECE_BYTES, Blob, LayerCache, Manifest
from azu.models.store import PieceHasher
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import VALIDATORS
from azu.wire.messages import LAYERS_PROTOCOL, MAX_PART_BYTES

LIMIT = 60.0  # seconds; only keeps a hung test from hanging the run
PUBLISHER, ME, FIRST, SECOND = (Identity(bytes([number]) * 32) for number in range(1, 5))

BIG = hashlib.shake_256(b"big").digest(2 * MAX_PART_BYTES + 12_345)  # three parts
SMALL = b"a small file"
EMPTY = b""


def blob_of(data: bytes) -> Blob:
    hasher = PieceHasher()
    hasher.update(data)
    pieces = hashlib.sha256(hasher.piece_list).hexdigest() if len(data) > PIECE_BYTES else ""
    return Blob(hasher.digest, len(data), pieces)


def manifest_of(*layers: bytes) -> Manifest:
    return Manifest(
        model_id="owner/tiny",
        revision="main",
        origin="",
        architecture="LlamaForCausalLM",
        dtype="float16",
        n_layers=len(layers),
        hidden_size=32,
        vocab_size=64,
        context_length=128,
        config=blob_of(b"{}"),
        tokenizer={},
        layers=tuple(blob_of(data) for data in layers),
        caches=(LayerCache(32),) * len(layers),
        shared={},
        sources={},
        tied=False,
    )


@dataclass
class Node:
    overlay: Overlay
    library: Library

    @property
    def peer_id(self) -> str:
        return self.overlay.peer_id


@asynccontextmanager
async def opened(identity: Identity, folder: Path, *files: bytes) -> AsyncIterator[Node]:
    library = Library(folder / identity.peer_id)
    for data in files:
        library.store.put_bytes(data)
    config = OverlayConfig(identity.seed, ("/ip4/127.0.0.1/tcp/0",), validators=VALIDATORS)
    async with open_overlay(config) as overlay:
        overlay.handle(LAYERS_PROTOCOL, partial(serve_layers, library))
        yield Node(overlay, library)


Nodes = tuple[Node, Node, Node]


@asynccontextmanager
async def three_nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """(me, first, second): I am connected to the two others, which hold every file."""
    async with AsyncExitStack() as stack:
        me = await stack.enter_async_context(opened(ME, tmp_path))
        others = [
            await stack.enter_async_context(opened(identity, tmp_path, BIG, SMALL, EMPTY))
            for identity in (FIRST, SECOND)
        ]
        for other in others:
            await me.overlay.connect(other.peer_id, other.overlay.addrs)
        with trio.fail_after(LIMIT):
            yield (me, *others)


async def fetch(me: Node, peers: Sequence[Node], *files: bytes, progress: Callable[[int], None] | None = None) -> None:
    blobs = [blob_of(data) for data in files]
    await fetch_blobs(me.overlay, [peer.peer_id for peer in peers], me.library.store, blobs, progress=progress)


def assert_has(node: Node, *files: bytes) -> None:
    for data in files:
        digest = blob_of(data).digest
        assert node.library.store.path(digest).read_bytes() == data
    assert not list((node.library.store.root / "partial").iterdir())
