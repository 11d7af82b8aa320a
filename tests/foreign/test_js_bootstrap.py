"""A js-libp2p node joins through a real bootstrap node: identify, ping, and what azu's workers left in the DHT."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from azu.identity import Identity
from azu.overlay import Overlay
from azu.records import WORKERS_KEY, sign_worker_record, worker_key
from tests.dht.records import held, worker
from tests.foreign.conftest import OpenJs
from tests.local_swarm import LOOPBACK, Program
from tests.overlay.conftest import LIMIT


@pytest.fixture
def bootstrap(tmp_path: Path) -> Iterator[str]:
    """The multiaddr of `azu-bootstrap run`, a process of its own."""
    program = Program("bootstrap", ["azu-bootstrap", "run", "--listen", LOOPBACK, "--data-dir", str(tmp_path)])
    try:
        yield str(program.wait_for("bootstrap node ready")["addrs"][0])
    finally:
        program.stop()


@pytest.mark.swarm
async def test_js_joins_through_a_bootstrap_node_and_finds_a_worker(
    bootstrap: str, node: Overlay, open_js: OpenJs
) -> None:
    await node.bootstrap([bootstrap])
    record = worker(1, held(0, 15), now=int(time.time()))
    signed = sign_worker_record(Identity((1).to_bytes(32, "big")), record)
    await node.put_record(worker_key(node.peer_id), signed)
    await node.provide(WORKERS_KEY)

    async with open_js() as js:
        bootstrap_id = await js.call("dial", addr=bootstrap)
        assert bootstrap.endswith(f"/p2p/{bootstrap_id}")
        assert await js.call("ping", peer=bootstrap_id) >= 0
        told = await js.call("known", peer=bootstrap_id)
        assert told["agent"] == "azu-bootstrap/0.1.0"
        assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/ipfs/kad/1.0.0"} <= set(told["protocols"])
        assert told["addrs"] == told["signed"] == [bootstrap.removesuffix(f"/p2p/{bootstrap_id}")]
        while not await js.call("routingTable"):
            await trio.sleep(0.05)

        found = await js.call("providers", digest=WORKERS_KEY.hex())
        assert list(found) == [node.peer_id]
        assert await js.call("get", key=worker_key(node.peer_id)) == signed.hex()
        read = await js.call("openRecord", value=signed.hex())
        assert read == record.model_dump(mode="json")

        # It reaches the worker itself by what the DHT knows of it, and is reached.
        assert await js.call("dial", addr=found[node.peer_id][0]) == node.peer_id
        assert 0 < await node.ping(js.peer_id) < LIMIT
