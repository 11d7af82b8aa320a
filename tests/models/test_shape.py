"""What config.json is said to mean for memory, held against what transformers really keeps and builds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from azu.errors import ModelError
from azu.models.facts import read_facts
from azu.models.manifest import LayerCache
from azu.models.shape import layer_caches, workspace
from tests.models.families import FAMILIES, OTHERS, Family, architecture

BY_NAME = {family.name: family for family in FAMILIES}
OTHER = {family.name: family for family in OTHERS}
TOKENS, MORE = 21, 3


def saved(config: Any) -> dict[str, Any]:
    """As config.json has it."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


@pytest.mark.parametrize("name", BY_NAME)
def test_what_each_layer_keeps(name: str) -> None:
    for layer, expected in after_a_few_tokens(BY_NAME[name]):
        assert values_of(layer) == expected.per_token * tokens_of(expected.window)
        assert states_of(layer) <= expected.state_bytes <= 1.5 * states_of(layer)


@pytest.mark.parametrize("name", OTHER)
def test_families_without_a_rule_keep_no_more(name: str) -> None:
    for layer, expected in after_a_few_tokens(OTHER[name]):
        assert values_of(layer) <= expected.per_token * tokens_of(expected.window)
        assert states_of(layer) <= expected.state_bytes


def after_a_few_tokens(family: Family) -> list[tuple[Any, LayerCache]]:
    """Each layer's cache, and what was expected of it."""
    config = family.build_config()
    estimated = layer_caches(saved(config), config.num_hidden_layers)
    model = architecture(config)._from_config(config).eval()
    cache = transformers.DynamicCache(config=config)
    with torch.inference_mode():
        for count in (TOKENS, *[1] * MORE):
            model(input_ids=torch.ones((1, count), dtype=torch.int64), past_key_values=cache, use_cache=True)
    return list(zip(cache.layers, estimated, strict=True))


def tokens_of(window: int) -> int:
    """A window is one token shorter between steps: the next one comes to it."""
    return min(TOKENS + MORE, window - 1) if window else TOKENS + MORE


def values_of(layer: Any) -> int:
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.numel() for tensor in held if tensor is not None)


def states_of(layer: Any) -> int:
    states = (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None))
    return sum(tensor.nbytes for state in states if state for tensor in state.values() if tensor is not None)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_each_layer_computes_when_it_is_loaded(name: str) -> None:
    """Tables of a context of 2,048 tokens; those of the whole model (rotary frequencies) are a few hundred bytes."""
    config = BY_NAME[name].build_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if hasattr(config, key):
            setattr(config, key, 2048)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = sum(buffer.nbytes for buffer in model.buffers())
    assert built - 10_000 <= workspace(saved(config)).tables * config.num_hidden_layers <= built


@pytest.mark.parametrize("name", BY_NAME)
def test_who_writes_all_scores_to_memory(name: str) -> None:
    config = BY_NAME[name].build_config()
    family: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    unfused = workspace(saved(config)).pair > 8
    assert unfused or family._supports_sdpa


LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("gemma2", {"sliding_window": 8}, [8, 0, 8, 0, 8, 0]),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, 0, 8, 8, 0]),
        ("cohere2", {"sliding_window": 8}, [8, 8, 8, 0, 8, 8]),
        ("llama4_text", {"attention_chunk_size": 8}, [8, 8, 8, 0, 8, 8]),
        ("mistral", {"sliding_window": 8}, [8] * 6),
        ("mistral", {"sliding_window": None}, [0] * 6),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, [0] * 6),
    ],
)
def test_older_configs_name_no_layer_types(model_type: str, changes: dict[str, Any], windows: list[int]) -> None:
    caches = layer_caches({**LLAMA, "model_type": model_type, **changes}, 6)
    assert [cache.window for cache in caches] == windows
    assert {cache.per_token for cache in caches} == {2 * 2 * 16}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "cohere2", "gpt_oss", "qwen3_next", "llama4_text"])
def test_the_patterns_are_transformers_own(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    values = saved(config)
    kinds = values.pop("layer_types")
    guessed = layer_caches(values, config.num_hidden_layers)
    assert [kind == "full_attention" for kind in kinds] == [not c.window and not c.state_bytes for c in guessed]


def test_no_value_of_the_wrong_kind_is_more_than_refused() -> None:
    config = {**LLAMA, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "vocab_size": 64}
    names = {*config, "model_type", "layer_types", "sliding_window", "kv_lora_rank", "qk_rope_head_dim", "head_dim"}
    names |= {"linear_num_key_heads", "mamba_d_state", "num_experts", "intermediate_size", "max_position_embeddings"}
    outcomes = set()
    for name in names:
        for value in (None, "x", -5, 0, 1.5, True, 10**3000, [], [[]], {}, {"a": []}):
            try:
                read_facts({**config, "kv_lora_rank": 8, "qk_rope_head_dim": 8, name: value})
                outcomes.add("taken")
            except ModelError as error:
                outcomes.add(error.code)
    assert outcomes == {"taken", "bad_config"}


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 0}, {"hidden_size": None}, {"head_dim": "8"}, {"sliding_window": -1}]
)
def test_malformed_numbers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        layer_caches({**LLAMA, **changes}, 2)
    assert caught.value.code == "bad_config"
