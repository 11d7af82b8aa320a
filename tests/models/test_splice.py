"""A stage holds nothing but its own, and refuses what does not fit it; `test_families` says what it computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from azu.errors import InputError, ModelError
from azu.models.memory import kv_bytes, weights_bytes
from azu.models.publish import publish
from azu.models.splice import Stage, StageSpec, build_stage, stage_tensor_names
from azu.models.store import LayerStore
from tests.models.conftest import Published
from tests.models.running import build, in_stages

SaveTiny = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(save_tiny: SaveTiny, store: LayerStore, name: str = "LlamaConfig", **changes: Any) -> Published:
    source = save_tiny(name, **changes)
    return Published(publish(str(source), store), store, source)


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_holds_only_its_own(save_tiny: SaveTiny, store: LayerStore, tied: bool) -> None:
    published = tiny(save_tiny, store, tie_word_embeddings=tied)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    needs = {
        (0, 2): ["model.embed_tokens.weight"],
        (1, 3): [],
        (2, 4): sorted([head, "model.norm.weight"]),
        (0, 4): sorted({head, "model.embed_tokens.weight", "model.norm.weight"}),
    }
    for (start, end), expected in needs.items():
        spec = StageSpec(published.config, start, end, 4)
        names, shared = stage_tensor_names(spec)
        assert shared == expected
        assert {int(name.split(".")[2]) for name in names} == set(range(start, end))
        # Given every file of the model, it still takes nothing that it does not need.
        blobs = [*published.manifest.layers, *published.manifest.shared.values()]
        stage = build_stage(spec, torch.float32, "cpu", [store.path(blob.digest) for blob in blobs])
        tensors = [*stage.model.parameters(), *stage.model.buffers()]
        assert not any(tensor.is_meta for tensor in tensors)
        held = sum(parameter.nbytes for parameter in stage.model.parameters())
        estimate = weights_bytes(published.manifest, start, end, "float32")
        assert held <= estimate <= held * 1.15  # headers weigh in tiny files


def test_caches(save_tiny: SaveTiny, store: LayerStore) -> None:
    published = tiny(save_tiny, store)
    stage = build(published, 1, 4)
    one, other = stage.new_cache(5), stage.new_cache()
    assert stage.cache_bytes(one) == 0
    stage.forward(torch.ones(5, 32), one, 0)
    assert stage.cache_bytes(one) == kv_bytes(published.manifest, 1, 4, 5, "float32")
    assert stage.cache_bytes(other) == 0


def test_outputs(save_tiny: SaveTiny, store: LayerStore) -> None:
    published = tiny(save_tiny, store)
    first, last = build(published, 0, 3), build(published, 3, 4)
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    hidden = first.forward(torch.tensor([3, 4, 5]), first.new_cache(), 0)
    assert hidden.shape == (3, 32)
    assert last.forward(hidden, last.new_cache(), 0).shape == (1, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(save_tiny: SaveTiny, store: LayerStore, dtype: torch.dtype) -> None:
    published = tiny(save_tiny, store)
    stages = [build(published, 0, 1, dtype), build(published, 1, 4, dtype)]
    got = in_stages(stages, [torch.tensor([3, 4, 5])])
    assert got[0].dtype == dtype
    whole = in_stages([build(published, 0, 4, dtype)], [torch.tensor([3, 4, 5])])
    assert got[0].equal(whole[0])
    model: Any = stages[1].model
    rotary = model.base_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert rotary[0] == 1.0


@pytest.mark.parametrize(
    "inputs",
    [torch.ones(2, 31), torch.ones(2, 32).half(), torch.ones(0, 32), torch.ones(1, 2, 32), torch.tensor([1, 2])],
    ids=range(5),
)
def test_inputs_that_do_not_fit(save_tiny: SaveTiny, store: LayerStore, inputs: torch.Tensor) -> None:
    stage = build(tiny(save_tiny, store), 1, 2)
    with pytest.raises(InputError) as caught:
        stage.forward(inputs, stage.new_cache(), 0)
    assert caught.value.code == "bad_stage_input"


def test_files_that_do_not_fit(save_tiny: SaveTiny, store: LayerStore) -> None:
    published = tiny(save_tiny, store)
    spec = StageSpec(published.config, 0, 2, 4)
    with pytest.raises(ModelError) as caught:
        build_stage(spec, torch.float32, "cpu", published.paths(0, 1, ["model.embed_tokens.weight"]))
    assert caught.value.code == "missing_tensor"
    other = StageSpec({**published.config, "intermediate_size": 50}, 0, 2, 4)
    with pytest.raises(ModelError) as caught:
        build_stage(other, torch.float32, "cpu", published.paths(0, 2, ["model.embed_tokens.weight"]))
    assert caught.value.code == "bad_weights"


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_ranges(start: int, end: int) -> None:
    with pytest.raises(ModelError):
        StageSpec({}, start, end, 4)


def greedy(stages: list[Stage], ids: torch.Tensor, steps: int) -> list[int]:
    caches = [stage.new_cache() for stage in stages]
    tokens: list[int] = []
    position = 0
    for _ in range(steps):
        hidden = ids
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(hidden, cache, position)
        position += len(ids)
        ids = hidden.argmax(-1)
        tokens.append(int(ids))
    return tokens


def test_smollm2_in_three_stages_answers_as_generate_does(smollm2: Published) -> None:
    torch.set_num_threads(2)
    stages = [build(smollm2, start, end) for start, end in ((0, 10), (10, 20), (20, 30))]
    files = {name: smollm2.store.path(blob.digest) for name, blob in smollm2.manifest.tokenizer.items()}
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    template = json.loads(files["tokenizer_config.json"].read_text())["chat_template"]
    import jinja2

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = jinja2.Template(template).render(messages=question, add_generation_prompt=True)
    ids = torch.tensor(tokenizer.encode(prompt).ids)
    tokens = greedy(stages, ids, 8)
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
    assert tokens[-1] == 2

    whole: Any = build(smollm2, 0, 30).model
    answer = whole.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=20, do_sample=False)
    assert answer[0, len(ids) :].tolist() == tokens
