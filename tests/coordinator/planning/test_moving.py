"""When a KV cache is sent, and when it is computed again."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from azu.identity import Identity
from azu.models.manifest import LayerCache
from azu.records import Link, Speed, WorkerRecord
from azu.tickets import JobTicket
from coordinator.planning.moving import cache_seconds
from tests.distribution.nodes import manifest_of

BEFORE, LEAVER, HEIR = (Identity(bytes([number]) * 32).peer_id for number in (1, 2, 3))
MANIFEST = replace(
    manifest_of(*(bytes([number]) for number in range(4))), caches=(LayerCache(256),) * 4, hidden_size=1_000
)
POSITIONS = 1_000
# Two layers keep 2 KiB of a position in float32, so 2.048 MB of all; hidden states are 4 MB.


def seconds(index: int = 1, *, prefill_ns: int = 10**6, cache: LayerCache | None = None, **lines: int) -> float | None:
    """What it says of a stage of layers 0-1 or 2-3. lines: bytes per second that the one and the other measured."""
    manifest = MANIFEST if cache is None else replace(MANIFEST, caches=(*MANIFEST.caches[:3], cache))
    now = int(time.time())

    def record(peer_id: str, **more: Any) -> WorkerRecord:
        fields: dict[str, Any] = {
            "peer_id": peer_id, "sequence": 1, "issued_at": now, "expires_at": now + 60, "agent": "", "protocols": (),
            "addrs": (), "device": "", "dtype": "float32", "vram_total": 1, "vram_free": 0, "kv_tokens": 1,
            "kv_tokens_free": 1, "jobs": 1, "layer_us": 1, "payout_address": "", "ranges": (),
        }  # fmt: skip
        return WorkerRecord.model_validate(fields | more)

    def line(rate: int) -> tuple[Link, ...]:
        return (Link(peer_id=HEIR, rtt_us=2_000, bytes_per_s=rate),)

    records = {
        BEFORE: record(BEFORE, links=line(lines.get("before", 10**9))),
        LEAVER: record(LEAVER, links=line(lines.get("leaver", 10**9))),
        HEIR: record(HEIR, speed=Speed(prefill_ns=prefill_ns)),
    }
    peers = (LEAVER, BEFORE) if index == 0 else (BEFORE, LEAVER)
    ticket = JobTicket.model_validate(
        {
            "job_id": b"j" * 16, "epoch": 0, "manifest": manifest.digest, "n_layers": 4,
            "stages": [{"peer_id": peer, "start": 2 * n, "end": 2 * n + 2} for n, peer in enumerate(peers)],
            "dtype": "float32", "prompt_tokens": 900, "max_tokens": 200, "stop_tokens": (), "sampling": {},
            "price": 2, "begun_at": 0, "issued_at": 0, "expires_at": 1, "coordinator": BEFORE,
        }
    )  # fmt: skip
    return cache_seconds(manifest, records.get, ticket, index, HEIR, POSITIONS)


@pytest.mark.parametrize(
    ("expected", "case"),
    [
        (0.001 + 0.002048, {}),  # it would compute for 2 s
        (0.001 + 0.2048, {"leaver": 10**7}),
        (None, {"leaver": 10**6}),
        (0.001 + 0.002048, {"prefill_ns": 1_000}),  # 2 ms, but hidden states come in 5
        (None, {"prefill_ns": 1_000, "before": 10**10}),  # they come in 1.4
        (None, {"prefill_ns": 1_000, "index": 0}),  # for the first stage there are none
        (0.001 + 0.2048 * 0.8, {"leaver": 0}),  # as a line that nobody measured
        (None, {"prefill_ns": 0}),  # not measured
        (None, {"cache": LayerCache(256, window=64)}),
        (None, {"cache": LayerCache(256, state_bytes=8)}),
    ],
)
def test_a_cache_is_sent_where_that_is_faster(expected: float | None, case: dict[str, Any]) -> None:
    assert seconds(**case) == (None if expected is None else pytest.approx(expected))
