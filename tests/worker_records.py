"""Workers' records for tests, of a model with twelve small layers."""

from __future__ import annotations

import hashlib
from typing import Any

from azu.identity import Identity
from azu.models.manifest import Blob, LayerCache, Manifest, Weights
from azu.planning import shape_of
from azu.records import WorkerRecord


def blob(number: int) -> Blob:
    return Blob(hashlib.sha256(bytes([number])).hexdigest(), 1_000, weights=(Weights("F16", 1_000, 1_000),))


MANIFEST = Manifest(
    model_id="owner/tiny",
    revision="main",
    origin="",
    architecture="LlamaForCausalLM",
    dtype="float16",
    n_layers=12,
    hidden_size=32,
    vocab_size=64,
    context_length=128,
    config=blob(0),
    tokenizer={},
    layers=tuple(blob(10 + index) for index in range(12)),
    caches=(LayerCache(32),) * 12,
    shared={"model.embed_tokens.weight": blob(1)},
    sources={},
    tied=True,
)
OTHER = "f" * 64


def worker(number: int, *ranges: tuple[str, int, int, str], **changes: Any) -> WorkerRecord:
    fields: dict[str, Any] = {
        "peer_id": Identity(bytes([number]) * 32).peer_id,
        "sequence": 1,
        "issued_at": 0,
        "expires_at": 1,
        "agent": "test",
        "protocols": (),
        "addrs": (),
        "device": "test",
        "dtype": "float16",
        "vram_total": 100,
        "vram_free": 60,
        "kv_tokens": 0,
        "kv_tokens_free": 7,
        "jobs": 3,
        "layer_us": 0,
        "ranges": [
            {"manifest": manifest, "start": start, "end": end, "state": state} for manifest, start, end, state in ranges
        ],
        "payout_address": "",
    }
    return WorkerRecord.model_validate(fields | changes)


OURS = MANIFEST.digest


def room_for(layers: int) -> int:
    return shape_of(MANIFEST, "float16", 1).stage_bytes(0, layers)
