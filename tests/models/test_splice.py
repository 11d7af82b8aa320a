"""A model in stages gives bit by bit what it gives in one piece, and a stage holds nothing but its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from azu.errors import InputError, ModelError
from azu.models.memory import kv_bytes, weights_bytes
from azu.models.publish import publish
from azu.models.splice import Stage, StageSpec, build_stage, stage_tensor_names
from azu.models.store import LayerStore
from tests.models.conftest import Published

SaveTiny = Callable[..., Path]

GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "MistralConfig": {"sliding_window": 8},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 8},
    "GPT2Config": {**GPT, "scale_attn_by_inverse_layer_idx": True},
    "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "BloomConfig": {"n_layer": 4, "n_head": 4},
    "GPTNeoConfig": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "GPTNeoXConfig": {},
    "MixtralConfig": {"num_local_experts": 4},
    "GraniteConfig": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
}
CUTS = [(0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 1, 2, 4), (0, 1, 3, 4), (0, 2, 3, 4)]
STEPS = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models gain nothing from more, and the order of sums is fixed
    yield
    torch.set_num_threads(before)


def build(published: Published, start: int, end: int, dtype: torch.dtype = torch.float32) -> Stage:
    spec = StageSpec(published.config, start, end, published.manifest.n_layers)
    _, shared = stage_tensor_names(spec)
    return build_stage(spec, dtype, "cpu", published.paths(start, end, shared))


def tiny(save_tiny: SaveTiny, store: LayerStore, name: str = "LlamaConfig", **changes: Any) -> Published:
    source = save_tiny(name, **changes)
    return Published(publish(str(source), store), store, source)


def reference(source: Path, ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Logits [1, vocab] of the prompt's last token and of each greedy step, by the unsplit model."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for parameter in model.parameters():  # out of the file's mapping, whose alignment changes the last bit
        parameter.data = parameter.data.clone()
    cache = transformers.DynamicCache(config=model.config)
    logits: list[torch.Tensor] = []
    with torch.inference_mode():
        for _ in range(steps):
            output = model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits.append(output.logits[0, -1:])
            ids = logits[-1].argmax(-1)
    return logits


def in_stages(stages: list[Stage], ids: torch.Tensor, steps: int, chunk: int = 1 << 30) -> list[torch.Tensor]:
    caches = [stage.new_cache() for stage in stages]
    logits: list[torch.Tensor] = []
    position = 0
    for _ in range(steps):
        hidden = ids
        for part in torch.split(ids, chunk):
            hidden = part
            for stage, cache in zip(stages, caches, strict=True):
                hidden = stage.forward(hidden, cache, position)
            position += len(part)
        logits.append(hidden)
        ids = hidden.argmax(-1)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_gives_the_same_bits(family: str, save_tiny: SaveTiny, store: LayerStore) -> None:
    published = tiny(save_tiny, store, family, **FAMILIES[family])
    ids = torch.randint(3, 64, (11,), generator=torch.Generator().manual_seed(1))
    expected = reference(published.source, ids, STEPS)
    built: dict[tuple[int, int], Stage] = {}
    for cut in CUTS:
        ranges = list(pairwise(cut))
        for start, end in ranges:
            if (start, end) not in built:
                built[start, end] = build(published, start, end)
        got = in_stages([built[part] for part in ranges], ids, STEPS)
        assert [tensor.shape for tensor in got] == [(1, 64)] * STEPS
        assert all(one.equal(other) for one, other in zip(got, expected, strict=True)), cut


def test_prefill_in_chunks(save_tiny: SaveTiny, store: LayerStore) -> None:
    published = tiny(save_tiny, store)
    ids = torch.arange(3, 40)
    stages = [build(published, 0, 2), build(published, 2, 4)]
    whole, chunked = in_stages(stages, ids, 3), in_stages(stages, ids, 3, chunk=8)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, chunked, strict=True))


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
    one, other = stage.new_cache(), stage.new_cache()
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
    got = in_stages(stages, torch.tensor([3, 4, 5]), 2)
    assert got[0].dtype == dtype
    whole = in_stages([build(published, 0, 4, dtype)], torch.tensor([3, 4, 5]), 2)
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


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_type": "no-such-model"}, "unsupported_architecture"),
        ({"model_type": None}, "unsupported_architecture"),
        ({"architectures": ["OddForCausalLM"]}, "unsupported_architecture"),
        ({"architectures": []}, "unsupported_architecture"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "unsupported_architecture"),
        ({"num_hidden_layers": 10**9}, "bad_config"),
        ({"hidden_act": "no-such-function"}, "bad_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unsupported_quantization"),
    ],
)
def test_configs_that_cannot_be_served(changes: dict[str, Any], code: str) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=4, architectures=["LlamaForCausalLM"]).to_dict()
    with pytest.raises(ModelError) as caught:
        stage_tensor_names(StageSpec({**config, **changes}, 0, 2, 4))
    assert caught.value.code == code


def test_a_config_cannot_choose_code(save_tiny: SaveTiny, store: LayerStore) -> None:
    published = tiny(save_tiny, store)
    hostile = {"auto_map": {"AutoModelForCausalLM": "evil.py--Evil"}, "_attn_implementation": "evil/kernel"}
    hostile |= {"attn_implementation": "evil/kernel", "experts_implementation": "evil/kernel"}
    spec = StageSpec(published.config | hostile, 1, 2, 4)
    stage = build_stage(spec, torch.float32, "cpu", published.paths(1, 2, []))
    assert stage.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_ranges(start: int, end: int) -> None:
    with pytest.raises(ModelError):
        StageSpec({}, start, end, 4)


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
    tokens = [int(logits.argmax()) for logits in in_stages(stages, ids, 8)]
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
    assert tokens[-1] == 2

    whole: Any = build(smollm2, 0, 30).model
    answer = whole.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=20, do_sample=False)
    assert answer[0, len(ids) :].tolist() == tokens
