"""Which configs name a model that can be cut; all others are refused by name, soon, and without much memory."""

from __future__ import annotations

import io
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from azu.errors import ModelError
from azu.models import architecture, judge_process
from azu.models.publish import publish
from azu.models.splice import StageSpec, build_stage, stage_tensor_names
from azu.models.store import LayerStore
from tests.models.conftest import TINY, Published
from tests.models.family_settings import GPT

SaveTiny = Callable[..., Path]


def config_of(name: str, family: str, **changes: Any) -> dict[str, Any]:
    config = getattr(transformers, name)(**{**TINY, **changes}, architectures=[family])
    return dict(json.loads(config.to_json_string(use_diff=False)))


def refused(config: dict[str, Any], n_layers: int = 4) -> ModelError:
    with pytest.raises(ModelError) as caught:
        stage_tensor_names(StageSpec(config, 1, 2, n_layers))
    return caught.value


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


LLAMA = config_of("LlamaConfig", "LlamaForCausalLM")
HYBRID = {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_type": "no-such-model"}, "unsupported_architecture"),
        ({"model_type": None}, "unsupported_architecture"),
        ({"model_type": ["llama"]}, "unsupported_architecture"),
        ({"architectures": ["OddForCausalLM"]}, "unsupported_architecture"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "unsupported_architecture"),
        ({"architectures": ["__class__"]}, "unsupported_architecture"),
        ({"architectures": ["AutoModelForCausalLM"]}, "unsupported_architecture"),
        ({"architectures": []}, "unsupported_architecture"),
        ({"architectures": None}, "unsupported_architecture"),
        ({"text_config": LLAMA}, "unsupported_architecture"),
        ({"hidden_act": "no-such-function"}, "bad_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unsupported_quantization"),
        ({"num_hidden_layers": 5}, "bad_config"),
        ({"num_hidden_layers": "4"}, "bad_config"),
        ({"hidden_size": 0}, "bad_config"),
        ({"hidden_size": -32}, "bad_config"),
        ({"hidden_size": None}, "bad_config"),
        ({"vocab_size": {"__float__": "Infinity"}}, "bad_config"),
        ({"vocab_size": {"__float__": ["Infinity"]}}, "bad_config"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "bad_config"),
        ({"rope_parameters": [[[]]]}, "bad_config"),
        ({"rope_parameters": nested(400)}, "bad_config"),
    ],
)
def test_configs_that_cannot_be_served(changes: dict[str, Any], code: str) -> None:
    assert refused({**LLAMA, **changes}).code == code


def test_a_config_that_counts_its_layers_elsewhere() -> None:
    assert refused({"architectures": ["BltForCausalLM"], "model_type": "blt"}).code == "bad_config"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma2Config", {"layer_types": ["full_attention"] * 3}),
        ("Gemma2Config", {"layer_types": ["evil"] * 4}),
        ("Gemma2Config", {"layer_types": {"a": 1}}),
        ("Gemma2Config", {"layer_types": [[["full_attention"]]] * 4}),
        ("GPTNeoConfig", {"attention_types": [[["global"], 1 << 40]], "num_layers": 4}),
        ("GPTNeoConfig", {"attention_types": 7, "num_layers": 4}),
        ("Qwen2MoeConfig", {"num_experts": 10**9}),
        ("Qwen2MoeConfig", {"mlp_only_layers": 3}),
        ("DeepseekV3Config", {"n_routed_experts": 10**9}),
        ("DeepseekV3Config", {"num_mtp_layers": 10**9}),
        ("GPT2Config", {"n_layer": 10**9}),
        ("Gemma2Config", {"num_hidden_layers": 10**6}),
        ("Gemma4TextConfig", {"num_kv_shared_layers": 1000, "hidden_size_per_layer_input": []}),
        ("LlamaConfig", {"vocab_size": 1 << 40}),
        ("LlamaConfig", {"vocab_size": 1 << 31, "hidden_size": 1 << 32}),
        ("LlamaConfig", {"pad_token_id": [0] * 200_000}),
        ("LlamaConfig", {"num_labels": 1 << 31}),
        ("MptConfig", {"n_layers": 4, "n_heads": 1 << 29}),
        ("MptConfig", {"n_layers": 4, "max_seq_len": 1 << 29}),
        ("FalconH1Config", {"mamba_chunk_size": 1 << 14}),
    ],
    ids=range(20),
)
def test_a_hostile_config_ends_soon_and_small(name: str, changes: dict[str, Any]) -> None:
    model_type = getattr(transformers, name).model_type
    family = transformers.AutoModelForCausalLM._model_mapping[getattr(transformers, name)].__name__
    config = {**TINY, "model_type": model_type, "architectures": [family], **changes}
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert refused(config).code == "bad_config"
    assert time.process_time() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB


def test_a_model_of_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage_tensor_names(StageSpec(LLAMA, 1, 2, 4))
    monkeypatch.setattr(architecture, "MAX_PARAMETERS", 20)  # it has 39
    assert "more than 20 tensors" in refused(LLAMA).message


def test_a_config_may_not_ask_for_more_than_the_files_hold(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    published = Published(publish(str(source), store), store, source)
    spec = StageSpec({**published.config, "intermediate_size": 1 << 31}, 1, 2, 4)  # 768 GiB in float32
    with pytest.raises(ModelError) as caught:
        build_stage(spec, torch.float32, "cpu", published.paths(1, 2, []))
    assert caught.value.code == "bad_weights"


@pytest.mark.parametrize(
    ("name", "family", "settings", "reason"),
    [
        ("BartConfig", "BartForCausalLM", {}, "decoder-only"),
        ("T5Config", "T5ForConditionalGeneration", {}, "decoder-only"),
        ("ViTConfig", "ViTForImageClassification", {}, "decoder-only"),
        ("BertConfig", "BertLMHeadModel", {}, "follow them"),
        ("XLNetConfig", "XLNetLMHeadModel", {"n_layer": 4, "d_model": 32, "n_head": 4, "d_inner": 48}, "cache"),
        ("MambaConfig", "MambaForCausalLM", {}, "cache"),
        ("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 8}, "cache"),
        ("FalconMambaConfig", "FalconMambaForCausalLM", {}, "cache"),
        ("RwkvConfig", "RwkvForCausalLM", {}, "cache"),
        ("xLSTMConfig", "xLSTMForCausalLM", {}, "cache"),
        ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT, "cache"),
        ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {}, "state of one job"),
        ("JambaConfig", "JambaForCausalLM", {}, "begin anew"),
        ("Gemma4TextConfig", "Gemma4ForCausalLM", {"num_kv_shared_layers": 2}, "rotary"),
        ("Inkling2TextConfig", "Inkling2ForCausalLM", {}, "computed from the tokens"),
        ("ZambaConfig", "ZambaForCausalLM", HYBRID, "computed from the tokens"),
        ("Zamba2Config", "Zamba2ForCausalLM", HYBRID, "computed from the tokens"),
        ("CpmAntConfig", "CpmAntForCausalLM", {}, "computed from the tokens"),
        ("Gemma3nTextConfig", "Gemma3nForCausalLM", {}, "KV cache of earlier"),
        ("DeepseekV4Config", "DeepseekV4ForCausalLM", {}, "as it is"),
        ("HYV4Config", "HYV4ForCausalLM", {}, "as it is"),
        ("MllamaTextConfig", "MllamaForCausalLM", {"cross_attention_layers": [1, 3]}, "in order"),
        ("LongcatFlashConfig", "LongcatFlashForCausalLM", {"num_layers": 2}, "no list of 4 layers"),
        ("MiniMaxConfig", "MiniMaxForCausalLM", {}, "cache of its own"),
        ("BioGptConfig", "BioGptForCausalLM", {}, "cannot be followed"),
        ("ModernBertDecoderConfig", "ModernBertDecoderForCausalLM", {}, "touches modules of others"),
        ("MistralConfig", "MistralForCausalLM", {"per_layer_config": {"3": {"sliding_window": 4}}}, "single layers"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration", {}, "images"),
        ("Llama4Config", "Llama4ForConditionalGeneration", {}, "images"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("Config") else "",
)
def test_families_that_cannot_be_cut(name: str, family: str, settings: dict[str, Any], reason: str) -> None:
    known = set(getattr(transformers, name).__dataclass_fields__)
    tiny = {key: value for key, value in TINY.items() if key in known}
    config = getattr(transformers, name)(**{**tiny, **settings}, architectures=[family])
    error = refused(dict(json.loads(config.to_json_string(use_diff=False))))
    assert error.code == "unsupported_architecture"
    assert family in error.message
    assert reason in error.message
    assert error.remedy


def test_a_class_that_auto_classes_do_not_know() -> None:
    """`Mistral 4` among the families is one; here is a class of the same config that is no language model."""
    assert transformers.Mistral4Config not in transformers.AutoModelForCausalLM._model_mapping
    config = config_of("GPT2Config", "GPT2DoubleHeadsModel", **GPT)
    assert refused(config).code == "unsupported_architecture"


@pytest.mark.parametrize("family", ["Llama", "Mamba"])
def test_the_process_that_judges_says_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(config_of(f"{family}Config", f"{family}ForCausalLM"))))
    judge_process.main()
    refusal = json.loads(capsys.readouterr().out)
    assert refusal.get("code") == (None if family == "Llama" else "unsupported_architecture")


def test_a_config_cannot_choose_code(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    published = Published(publish(str(source), store), store, source)
    hostile: dict[str, Any] = {"auto_map": {"AutoModelForCausalLM": "evil.py--Evil"}}
    hostile |= dict.fromkeys(("_attn_implementation", "attn_implementation", "experts_implementation"), "evil/kernel")
    hostile["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "auto_map": "evil"}
    spec = StageSpec(published.config | hostile, 1, 2, 4)
    stage = build_stage(spec, torch.float32, "cpu", published.paths(1, 2, []))
    assert stage.model.config._attn_implementation == "sdpa"
    assert "evil" not in stage.model.config.to_json_string()
