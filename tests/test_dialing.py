"""Dialling by peer id: of what a worker's record says, only addresses are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from azu.dialing import open_worker_stream
from azu.errors import NetworkError
from azu.identity import Identity
from azu.records import WorkerRecord, sign_worker_record, worker_key

WORKER, OTHER = Identity(b"w" * 32), Identity(b"o" * 32)
GOOD = f"/ip4/203.0.113.7/tcp/4001/p2p/{WORKER.peer_id}"


class OverlayTwin:
    """Remembers what was dialled."""

    def __init__(self, record: bytes | None, *, connected: bool = False) -> None:
        self._record = record
        self._connected = connected
        self.dialled: list[tuple[str, str, tuple[str, ...]]] = []

    def is_connected(self, peer_id: str) -> bool:
        return self._connected

    async def get_record(self, key: str) -> bytes | None:
        assert not self._connected, "nothing to look up where there is a connection"
        assert key == worker_key(WORKER.peer_id)
        return self._record

    async def open_stream(self, peer_id: str, protocol: str, *, addrs: Sequence[str]) -> str:
        self.dialled.append((peer_id, protocol, tuple(addrs)))
        if not addrs and not self._connected:
            raise NetworkError("nobody knows where it is")
        return "stream"


def record(*addrs: str) -> bytes:
    fields: dict[str, Any] = {
        "peer_id": WORKER.peer_id, "sequence": 1, "issued_at": 0, "expires_at": 1, "agent": "", "protocols": (),
        "addrs": addrs, "device": "", "dtype": "float32", "vram_total": 0, "vram_free": 0, "kv_tokens": 0,
        "kv_tokens_free": 0, "jobs": 0, "layer_us": 0, "ranges": (), "payout_address": "",
    }  # fmt: skip
    return sign_worker_record(WORKER, WorkerRecord.model_validate(fields))


async def dialled(twin: OverlayTwin) -> tuple[str, ...]:
    assert await open_worker_stream(twin, WORKER.peer_id, "/p/1") == "stream"  # type: ignore[arg-type,comparison-overlap]
    ((peer_id, protocol, addrs),) = twin.dialled
    assert (peer_id, protocol) == (WORKER.peer_id, "/p/1")
    return addrs


async def test_the_records_addresses_are_dialled() -> None:
    assert await dialled(OverlayTwin(record(GOOD))) == (GOOD,)


async def test_a_connection_is_used_as_it_is() -> None:
    assert await dialled(OverlayTwin(None, connected=True)) == ()


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "garbage",
        "/",
        "/ip4/203.0.113.7/tcp/4001/p2p/" + OTHER.peer_id,
        f"/ip4/203.0.113.7/udp/4001/quic-v1/p2p/{WORKER.peer_id}",
        f"/ip4/300.0.113.7/tcp/4001/p2p/{WORKER.peer_id}",
        f"/ip4/203.0.113.7/tcp/4001/p2p-circuit/p2p/{WORKER.peer_id}",
        "/ip4/203.0.113.7/tcp/4001/p2p/\x00",
    ],
)
async def test_what_is_no_address_of_the_worker_is_skipped(odd: str) -> None:
    """The worker writes its record itself; its nonsense must not become our own bad input."""
    assert await dialled(OverlayTwin(record(odd, GOOD))) == (GOOD,)
    with pytest.raises(NetworkError):
        await open_worker_stream(OverlayTwin(record(odd)), WORKER.peer_id, "/p/1")  # type: ignore[arg-type]
