"""Memory estimates follow from the manifest and agree with what a stage really takes."""

from __future__ import annotations

import dataclasses

import pytest

from azu.errors import ModelError
from azu.models.manifest import Manifest
from azu.models.memory import kv_bytes, max_layers, weights_bytes


def test_weights_of_each_position(manifest: Manifest) -> None:
    # Layers are 1,000 bytes each, the embedding 5,000, the norm 10 and the head 1,000.
    assert weights_bytes(manifest, 0, 2, "float16") == 2000 + 5000
    assert weights_bytes(manifest, 1, 3, "bfloat16") == 2000
    assert weights_bytes(manifest, 3, 4, "float16") == 1000 + 10 + 1000
    assert weights_bytes(manifest, 0, 4, "float16") == 4000 + 6010
    assert weights_bytes(manifest, 1, 3, "float32") == 4000


def test_a_tied_embedding_is_in_both_ends_but_once_in_one_stage(manifest: Manifest) -> None:
    shared = {name: blob for name, blob in manifest.shared.items() if name != "lm_head.weight"}
    tied = dataclasses.replace(manifest, shared=shared, tied=True)
    assert weights_bytes(tied, 0, 1, "float16") == 1000 + 5000
    assert weights_bytes(tied, 3, 4, "float16") == 1000 + 10 + 5000
    assert weights_bytes(tied, 0, 4, "float16") == 4000 + 5010


def test_kv(manifest: Manifest) -> None:
    assert kv_bytes(manifest, 0, 3, 100, "float16") == 64 * 300
    assert kv_bytes(manifest, 0, 3, 100, "float32") == 64 * 600


def test_max_layers(manifest: Manifest) -> None:
    assert max_layers(manifest, 0, 5999, 0, "float16") == 0
    assert max_layers(manifest, 0, 7000, 0, "float16") == 2
    assert max_layers(manifest, 0, 7000, 1, "float16") == 1  # the cache of one token
    assert max_layers(manifest, 1, 1 << 40, 100, "float32") == 3
    assert max_layers(manifest, 4, 1 << 40, 100, "float32") == 0


def test_refusals(manifest: Manifest) -> None:
    with pytest.raises(ModelError):
        weights_bytes(manifest, 2, 5, "float16")
    with pytest.raises(ModelError):
        kv_bytes(manifest, 0, 1, 1, "float8")
