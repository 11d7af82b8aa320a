"""js-libp2p nodes as strangers to azu."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest
import trio

from azu.identity import Identity
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import VALIDATORS, sign_worker_record, worker_key
from tests.dht.records import held, worker
from tests.foreign.js_home import install, why_not
from tests.foreign.js_peer import JsPeer, open_js_peer
from tests.overlay.conftest import LIMIT, LOOPBACK

OpenJs = Callable[..., AbstractAsyncContextManager[JsPeer]]


def node_config(number: int, *, server: bool = True) -> OverlayConfig:
    """What azu's programs open their overlays with."""
    return OverlayConfig(number.to_bytes(32, "big"), LOOPBACK, server, f"azu-test/{number}", validators=VALIDATORS)


def worker_record(number: int, *, version: int = 0) -> tuple[str, bytes]:
    """The key and the signed record of a worker, whose identity is that of the node of this number."""
    who = Identity(number.to_bytes(32, "big"))
    record = worker(number, held(0, version + 1), now=int(time.time()) + version)
    return worker_key(who.peer_id), sign_worker_record(who, record)


@pytest.fixture(scope="session")
def js_home() -> Path:
    """The folder in which js-libp2p is installed. Without Node.js its tests are skipped."""
    if reason := why_not():
        pytest.skip(f"NO FOREIGN PEER, so nothing here shows that other implementations understand azu: {reason}")
    return install()


@pytest.fixture
def open_js(js_home: Path) -> OpenJs:
    """`async with open_js(server=True) as js`: a js-libp2p node; `server`: whether it answers DHT queries."""
    return partial(open_js_peer, js_home)


@pytest.fixture
async def node() -> AsyncIterator[Overlay]:
    """An azu node that serves the DHT, under a deadline."""
    with trio.fail_after(LIMIT):
        async with open_overlay(node_config(1)) as overlay:
            yield overlay


@pytest.fixture
async def js(open_js: OpenJs, node: Overlay) -> AsyncIterator[JsPeer]:
    """A js-libp2p node that has dialled `node`."""
    async with open_js() as peer:
        await dialled(peer, node)
        yield peer


async def dialled(peer: JsPeer, node: Overlay) -> None:
    """Have a js-libp2p node dial; for it the connection exists a little earlier than for `node`."""
    await peer.call("dial", addr=node.addrs[0])
    while not node.is_connected(peer.peer_id):
        await trio.sleep(0.02)
