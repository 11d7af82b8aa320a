"""A part of a stage is a stage of its layers, over the same tensors; `test_families` says what it computes."""

from __future__ import annotations

import gc
import weakref
from itertools import combinations

import pytest
import torch

from azu.errors import ModelError
from azu.models.manifest import Manifest
from azu.models.memory import stage_memory
from azu.models.prepacked import PrepackedLinear, can_prepack
from azu.models.quantize import held_weights
from azu.models.splice import Part, Stage, StageSpec, build_stage, stage_tensor_names
from azu.wire.tensors import ACTIVATIONS, WeightFormat
from tests.models.running import in_stages, one_by_one, tensors_of
from tests.models.test_families import ANSWER, PROMPT, TOKENS, Models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "DeepSeek-V2", "Qwen3-Next", "Falcon-H1", "GPT-2"])
def test_a_part_is_what_a_stage_of_its_layers_is(models: Models, name: str) -> None:
    """Also in what its caches are made of, and in whether its jobs can share a pass."""
    for first, start, end in ((0, 0, 2), (0, 1, 3), (0, 2, 4), (1, 1, 3), (1, 2, 4)):
        part, alone = models.stage(name, first, 4).part(start, end), models.stage(name, start, end)
        assert (part.spec, part.is_first, part.is_last) == (alone.spec, alone.is_first, alone.is_last)
        assert part.can_pack == alone.can_pack
        inputs = PROMPT if start == 0 else torch.randn((11, 32), generator=torch.Generator().manual_seed(end))
        caches = part.new_cache(12), alone.new_cache(12)
        for position, rows in ((0, inputs[:10]), (10, inputs[10:])):
            got, wanted = part.forward(rows, caches[0], position), alone.forward(rows, caches[1], position)
            assert got.equal(wanted), (first, start, end)
        assert part.cache_bytes(caches[0]) == alone.cache_bytes(caches[1])
        assert list(map(type, caches[0].layers)) == list(map(type, caches[1].layers))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "DeepSeek-V2", "Mixtral"])
def test_jobs_of_a_part_share_a_pass_beside_those_of_the_whole(models: Models, name: str) -> None:
    whole = models.stage(name, 0, 4)
    part = whole.part(1, 3)
    prompts = [torch.randn((rows, 32), generator=torch.Generator().manual_seed(rows)) for rows in (9, 4, 1)]
    expected = torch.cat([part.forward(prompt, part.new_cache(), 0) for prompt in prompts])
    ids = [Part(TOKENS[:5], whole.new_cache(), 0), Part(TOKENS[5:6], whole.new_cache(), 0)]
    logits = torch.cat([whole.forward(each.inputs, whole.new_cache(), 0) for each in ids])
    caches = [part.new_cache() for _ in prompts]
    got = part.forward_pack([Part(prompt, cache, 0) for prompt, cache in zip(prompts, caches, strict=True)])
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.allclose(whole.forward_pack(ids), logits, atol=1e-4)
    more = [Part(prompt[:1], cache, len(prompt)) for prompt, cache in zip(prompts, caches, strict=True)]
    assert torch.allclose(part.forward_pack(more)[1:2], step_on(part, prompts[1]), atol=1e-4)
    later = whole.part(1, 3)  # whose last pass was of a pack
    assert later.forward(prompts[0], later.new_cache(), 0).equal(expected[: len(prompts[0])])


def step_on(part: Stage, prompt: torch.Tensor) -> torch.Tensor:
    cache = part.new_cache()
    part.forward(prompt, cache, 0)
    return part.forward(prompt[:1], cache, len(prompt))


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "Qwen3-Next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_weights_held_otherwise_are_shared_too(models: Models, name: str, dtype: WeightFormat) -> None:
    """Prepacked (in float32 the head alone) or as integers."""
    computing = getattr(torch, ACTIVATIONS[dtype])
    if dtype in ("int8", "int4"):
        pytest.importorskip("azu.models.integer_weights", exc_type=ImportError)
    elif not can_prepack(computing):
        pytest.skip("oneDNN has no such numbers on this CPU")
    published = models.published(name)
    spec = StageSpec(published.config, 0, 4, 4)
    paths = published.paths(0, 4, stage_tensor_names(spec)[1])
    whole = build_stage(spec, computing, "cpu", paths, held_weights(dtype, torch.device("cpu")))
    job = one_by_one(PROMPT, ANSWER)
    expected = in_stages([whole], job)
    parts = [whole.part(0, 1), whole.part(1, 3), whole.part(3, 4)]
    if dtype in ("bfloat16", "float32") and name != "GPT-2":  # whose head is an embedding, and which has no Linear
        assert any(isinstance(module, PrepackedLinear) for module in parts[2].model.modules())
    held = {id(tensor) for tensor in tensors_of(whole)}
    assert {id(tensor) for part in parts for tensor in tensors_of(part)} <= held
    assert all(map(torch.equal, in_stages(parts, job), expected))
    assert all(map(torch.equal, in_stages([whole], job), expected))


def test_a_part_outlives_neither_its_use_nor_its_stage(models: Models) -> None:
    published = models.published("Llama")
    spec = StageSpec(published.config, 0, 4, 4)
    whole = build_stage(spec, torch.float32, "cpu", published.paths(0, 4, stage_tensor_names(spec)[1]))
    part = whole.part(1, 4)
    part.forward(torch.ones(3, 32), part.new_cache(), 0)
    gc.collect()
    gc.disable()
    try:
        model, weight = weakref.ref(part.model), weakref.ref(next(part.model.parameters()))
        del part
        assert model() is None
        assert weight() is not None
        del whole
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("layers", [(0, 3), (1, 5), (0, 5), (2, 2), (3, 2), (-1, 2), (4, 4)])
def test_what_is_no_part(models: Models, layers: tuple[int, int]) -> None:
    with pytest.raises(ModelError) as caught:
        models.stage("Llama", 1, 4).part(*layers)
    assert caught.value.code == "bad_layer_range"


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "DeepSeek-V2", "Qwen3-Next", "Mixtral", "GPT-Neo"])
def test_a_part_never_needs_more_memory_than_the_whole(models: Models, name: str) -> None:
    manifest: Manifest = models.published(name).manifest
    for loaded in combinations(range(5), 2):
        for tokens, jobs in ((1, 1), (300, 3), (8192, 32)):
            whole = stage_memory(manifest, *loaded, "float32", tokens, jobs)
            for part in combinations(range(loaded[0], loaded[1] + 1), 2):
                needed = stage_memory(manifest, *part, "float32", tokens, jobs)
                assert needed.kv <= whole.kv
                assert needed.activations <= whole.activations
