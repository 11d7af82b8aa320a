"""The arithmetic of memory on a small made-up manifest; what really is used: tests/node/engine/test_memory.py."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azu.errors import ModelError
from azu.models.manifest import LayerCache, Manifest, Weights, Workspace
from azu.models.memory import (
    KEPT_KERNELS,
    MAX_JOBS,
    chunk_rows,
    kv_bytes,
    kv_room,
    max_layers,
    stage_memory,
    weights_bytes,
)
from azu.wire.tensors import WEIGHT_FORMATS, WeightFormat


def with_layers(manifest: Manifest, *weights: Weights) -> Manifest:
    layers = tuple(dataclasses.replace(blob, weights=weights) for blob in manifest.layers)
    return dataclasses.replace(manifest, layers=layers)


def with_caches(manifest: Manifest, *caches: LayerCache) -> Manifest:
    return dataclasses.replace(manifest, caches=caches)


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


def test_floats_are_cast_and_integers_are_not(manifest: Manifest) -> None:
    mixed = with_layers(manifest, Weights("BF16", 100, 0), Weights("F32", 200, 0), Weights("I64", 80, 0))
    assert weights_bytes(mixed, 1, 2, "float32") == 200 + 200 + 80
    assert weights_bytes(mixed, 1, 2, "float16") == 100 + 100 + 80


def test_integer_formats_take_the_layers_matrices_only(manifest: Manifest) -> None:
    # 400 values in matrices of 32 columns, 100 others; the embedding's 2,500 values stay 16-bit.
    assert weights_bytes(manifest, 1, 2, "int8") == 400 + 3 * 13 + 200
    assert weights_bytes(manifest, 1, 2, "int4") == 200 + 4 * 13 + 200
    assert weights_bytes(manifest, 0, 1, "int8") == weights_bytes(manifest, 1, 2, "int8") + 5000


def test_tables_are_weights_of_each_layer(manifest: Manifest) -> None:
    tables = dataclasses.replace(manifest, workspace=Workspace(tables=7))
    assert weights_bytes(tables, 1, 3, "float16") == 2000 + 14


def test_kv(manifest: Manifest) -> None:
    assert kv_bytes(manifest, 0, 3, 100, "float16") == 64 * 300
    assert kv_bytes(manifest, 0, 3, 100, "float32") == 64 * 600
    assert kv_bytes(manifest, 0, 3, 100, "int4") == 64 * 300  # computed in bfloat16


def test_a_window_costs_no_more_than_all_tokens_and_no_more_than_all_jobs_windows(manifest: Manifest) -> None:
    sliding = with_caches(manifest, *[LayerCache(32, window=10)] * 4)
    chunk = chunk_rows(32, "float16")
    assert kv_bytes(sliding, 0, 1, 100, "float16") == 64 * 100
    assert kv_bytes(sliding, 0, 1, 1 << 30, "float16") == 64 * MAX_JOBS * (10 + chunk)


def test_each_job_has_a_state(manifest: Manifest) -> None:
    linear = with_caches(manifest, *[LayerCache(0, state_bytes=1000)] * 4)
    assert kv_bytes(linear, 0, 2, 1 << 30, "float16") == 2 * MAX_JOBS * 1000
    assert kv_bytes(linear, 0, 2, 3, "float16") == 2 * 3 * 1000
    assert kv_room(linear, 0, 2, "float16", 1 << 30) == MAX_JOBS * linear.context_length


def test_the_parts_of_a_stages_peak(manifest: Manifest) -> None:
    work = Workspace(mlp=1000, attention=10, token=100, pair=5)
    busy = dataclasses.replace(manifest, workspace=work)
    chunk = 256
    rows = chunk + 31  # a chunk of one job, and a token of each other
    stream = rows * 4 * 32 * 2
    assert stage_memory(busy, 1, 2, "float16", 64).activations == stream + rows * 1000 * 2
    wide = dataclasses.replace(manifest, workspace=dataclasses.replace(work, attention=1000))
    attention = rows * 1000 * 2 + 64 * 100 * 2 + chunk * 64 * 5
    assert stage_memory(wide, 1, 2, "float16", 64).activations == stream + attention
    # No job is longer than the model's context of 128.
    assert stage_memory(wide, 1, 2, "float16", 999).activations == stream + attention + 64 * (200 + chunk * 5)


def test_sampling_takes_memory_for_each_job_of_a_pass(manifest: Manifest) -> None:
    large = dataclasses.replace(manifest, vocab_size=1 << 20)
    one, two, most = (stage_memory(large, 3, 4, "float16", 1, jobs).activations for jobs in (1, 2, MAX_JOBS))
    assert one > 1 << 20
    assert (two, most) == (2 * one, MAX_JOBS * one)
    assert stage_memory(large, 2, 3, "float16", 1).activations < 1 << 20, "the last stage alone does it"


def test_a_family_whose_jobs_take_turns_computes_one_at_a_time(manifest: Manifest) -> None:
    large = dataclasses.replace(manifest, vocab_size=1 << 20, architecture="BloomForCausalLM")
    for start in (2, 3):
        one, many = (stage_memory(large, start, 4, "float32", 64, jobs) for jobs in (1, MAX_JOBS))
        assert (one.activations, one.kernels) == (many.activations, many.kernels)


def test_kernels(manifest: Manifest) -> None:
    """In float32 one for each number of jobs, of a head that is packed; for all packed layers as many as are kept."""
    each = stage_memory(manifest, 3, 4, "float32", 64, 1).kernels
    assert stage_memory(manifest, 3, 4, "float32", 64).kernels == MAX_JOBS * each
    assert stage_memory(manifest, 2, 3, "float32", 64).kernels == 0
    assert stage_memory(manifest, 2, 3, "float32", 64, packed=True).kernels == KEPT_KERNELS * each
    assert stage_memory(manifest, 2, 3, "bfloat16", 64, 1).kernels == KEPT_KERNELS * each
    fused = dataclasses.replace(manifest, workspace=Workspace(fused=1))
    assert stage_memory(fused, 2, 3, "bfloat16", 64, 1).kernels > KEPT_KERNELS * each


def test_fusing_experts_is_over_before_jobs_come(manifest: Manifest) -> None:
    fused = dataclasses.replace(manifest, workspace=Workspace(fused=1))
    memory = stage_memory(fused, 1, 3, "float32", 0)
    assert memory.loading == 1000
    assert memory.total == memory.weights + memory.overhead + max(1000, memory.activations)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it never changes
@given(
    dtype=st.sampled_from(WEIGHT_FORMATS),
    start=st.integers(0, 3),
    memory=st.integers(0, 1 << 27),
    window=st.sampled_from([0, 7, 64]),
    state=st.sampled_from([0, 50_000]),
    packed=st.booleans(),
)
def test_what_fits_fits_and_one_more_does_not(
    manifest: Manifest, dtype: WeightFormat, start: int, memory: int, window: int, state: int, packed: bool
) -> None:
    caches = (LayerCache(3200, window, state),) * 4
    manifest = dataclasses.replace(manifest, caches=caches, workspace=Workspace(1000, 10, 9, 5))
    room = kv_room(manifest, start, 4, dtype, memory, packed=packed)
    if room >= 0:
        assert stage_memory(manifest, start, 4, dtype, room, packed=packed).total <= memory
    if room < MAX_JOBS * manifest.context_length:
        assert stage_memory(manifest, start, 4, dtype, room + 1, packed=packed).total > memory
    count = max_layers(manifest, start, memory, 50, dtype)
    if count:
        assert stage_memory(manifest, start, start + count, dtype, 50).total <= memory
    if start + count < 4:
        assert stage_memory(manifest, start, start + count + 1, dtype, 50).total > memory


def test_max_layers_stops_where_it_is_told(manifest: Manifest) -> None:
    assert max_layers(manifest, 0, 1 << 40, 100, "float32") == 4
    assert max_layers(manifest, 1, 1 << 40, 100, "float32", limit=3) == 2
    assert max_layers(manifest, 4, 1 << 40, 100, "float32") == 0
    assert max_layers(manifest, 0, 1000, 0, "float32") == 0


def test_refusals(manifest: Manifest) -> None:
    with pytest.raises(ModelError) as caught:
        weights_bytes(manifest, 2, 5, "float16")
    assert caught.value.code == "bad_layer_range"
    with pytest.raises(ModelError) as caught:
        kv_bytes(manifest, 0, 1, 1, "float8")  # type: ignore[arg-type]
    assert caught.value.code == "unsupported_dtype"


def test_where_layers_are_joined_one_of_them_is_held_twice_for_a_moment(manifest: Manifest) -> None:
    largest = max(blob.size for blob in manifest.layers[:2])
    for dtype, packed, loading in (
        ("float32", False, 0),
        ("float32", True, 2),
        ("bfloat16", False, 1),
        ("int8", False, 0),
    ):
        held = stage_memory(manifest, 0, 2, dtype, 1, packed=packed)  # type: ignore[arg-type]
        assert held.loading == loading * largest, dtype


def test_a_head_that_is_packed_is_held_twice_for_a_moment(manifest: Manifest) -> None:
    """But not one that is the embedding of the same stage: it stays plain."""
    weights = (Weights("F16", 90_000, 90_000),)
    head = dataclasses.replace(manifest.shared["lm_head.weight"], size=90_000, weights=weights)
    large = dataclasses.replace(manifest, shared={**manifest.shared, "lm_head.weight": head})
    held = stage_memory(large, 3, 4, "bfloat16", 1)
    assert held.weights + held.loading == 2 * 90_000
    assert stage_memory(large, 0, 3, "float32", 1).loading == 0
    tied = dataclasses.replace(large, tied=True)
    first, last = (stage_memory(tied, start, 4, "float32", 1) for start in (0, 3))
    assert first.loading == 0
    assert last.loading > 0
    assert last.kernels > first.kernels
