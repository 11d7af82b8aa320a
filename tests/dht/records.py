"""Records of made-up peers, live at `NOW`."""

from __future__ import annotations

from typing import Any

from azu.dht.snapshot import Pong, Seen, Snapshot
from azu.identity import Identity
from azu.records import CoordinatorRecord, HeldRange, ModelOffer, WorkerRecord

NOW = 1_800_000_000
MANIFEST = "ab" * 32
MODEL = "SmolLM2-135M-Instruct"


def identity(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


def held(start: int, end: int, state: str = "loaded", manifest: str = MANIFEST) -> HeldRange:
    return HeldRange.model_validate({"manifest": manifest, "start": start, "end": end, "state": state})


def worker(number: int, *ranges: HeldRange, now: int = NOW, **changed: Any) -> WorkerRecord:
    fields: dict[str, Any] = {
        "peer_id": identity(number).peer_id,
        "sequence": now * 1000,
        "issued_at": now - 12,
        "expires_at": now + 60,
        "agent": "azu-node/0.1.0",
        "protocols": ("/azu/control/1",),
        "addrs": (f"/ip4/192.0.2.{number}/tcp/4001/p2p/{identity(number).peer_id}",),
        "device": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
        "vram_total": 8 * 1024**3,
        "vram_free": 3 * 1024**3,
        "kv_tokens": 8192,
        "kv_tokens_free": 4096,
        "jobs": 2,
        "layer_us": 1230,
        "ranges": ranges,
        "payout_address": "",
    }
    return WorkerRecord.model_validate(fields | changed)


def coordinator(number: int, *offers: ModelOffer, now: int = NOW, **changed: Any) -> CoordinatorRecord:
    fields: dict[str, Any] = {
        "peer_id": identity(number).peer_id,
        "sequence": now * 1000,
        "issued_at": now - 5,
        "expires_at": now + 60,
        "agent": "azu-coordinator/0.1.0",
        "protocols": (),
        "addrs": (),
        "models": offers,
    }
    return CoordinatorRecord.model_validate(fields | changed)


def offer(n_layers: int = 30, model_id: str = MODEL, manifest: str = MANIFEST) -> ModelOffer:
    least = {"least_bytes": {"float32": 32 * 1024**2, "bfloat16": 16 * 1024**2}}
    return ModelOffer.model_validate({"model_id": model_id, "manifest": manifest, "n_layers": n_layers, **least})


def snapshot(*records: WorkerRecord | CoordinatorRecord, **left_out: Any) -> Snapshot:
    return Snapshot(
        taken_at=NOW,
        workers=tuple(Seen(each, Pong(0.0015, "direct")) for each in records if isinstance(each, WorkerRecord)),
        coordinators=tuple(Seen(each) for each in records if isinstance(each, CoordinatorRecord)),
        **left_out,
    )
