"""The families that the suite holds to parity, each as a small random model that exercises what is special in it.

`python -m tests.models.families` prints the table of docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.conftest import TINY
from tests.models.family_settings import (
    ALTERNATE,
    DEEPSEEK,
    DYNAMIC,
    GPT,
    LINEAR,
    LLAMA3,
    LONGROPE,
    MAMBA,
    SPARSE,
    THIRD_FULL,
    YARN,
)

__all__ = ["ALONE", "FAMILIES", "OTHERS", "Family", "save", "table"]


@dataclass(frozen=True)
class Family:
    """A family or a variant of one: its name, its transformers config class, what the settings exercise, and they."""

    name: str
    config: str
    traits: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def build_config(self) -> Any:
        """No key that the family does not know: others read the saved config, too."""
        kind = getattr(transformers, self.config)
        known = {*kind.__dataclass_fields__, *kind.attribute_map}
        return kind(**{key: value for key, value in TINY.items() if key in known} | self.settings)


FAMILIES = [
    Family("Llama", "LlamaConfig", "Llama 3 rope scaling", {"rope_parameters": LLAMA3}),
    Family(
        "Llama, tied",
        "LlamaConfig",
        "tied head; dynamic NTK rope past the trained length",
        {"tie_word_embeddings": True, "rope_parameters": DYNAMIC, "max_position_embeddings": 12},
    ),
    Family("Mistral", "MistralConfig", "", {"sliding_window": 8}),
    Family("Mixtral", "MixtralConfig", "experts", {"num_local_experts": 4, "sliding_window": 8}),
    Family(
        "Qwen2",
        "Qwen2Config",
        "window from one layer on",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        "experts in every second layer but one, shared expert; 6 layers",
        {**SPARSE, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6},
    ),
    Family("GPT-2", "GPT2Config", "scores scaled by layer index", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    Family(
        "GPT-Neo",
        "GPTNeoConfig",
        "local attention in layers 1 and 3",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    ),
    Family("GPT-J", "GPTJConfig", "partial rotary", {**GPT, "rotary_dim": 4}),
    Family("OPT", "OPTConfig", "position offset, projections in and out", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    Family("BLOOM", "BloomConfig", "ALiBi, normed embeddings", {"n_layer": 4, "n_head": 4}),
    Family("Falcon, old", "FalconConfig", "multi-query, ALiBi", {"alibi": True, "parallel_attn": False}),
    Family("Falcon, 7B", "FalconConfig", "multi-query, rotary, parallel attention"),
    Family("Falcon, new", "FalconConfig", "two norms", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("MPT", "MptConfig", "ALiBi", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}),
    Family("Phi", "PhiConfig", "partial rotary", {"partial_rotary_factor": 0.5}),
    Family(
        "Phi-3",
        "Phi3Config",
        "longrope that changes at the trained length",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 8},
    ),
    Family("Gemma", "GemmaConfig", "scaled embeddings", {"head_dim": 8}),
    Family("Gemma 2", "Gemma2Config", "soft caps", {"head_dim": 8, "sliding_window": 8}),
    Family("StarCoder2", "Starcoder2Config", "", {"sliding_window": 8}),
    Family(
        "DeepSeek-V2",
        "DeepseekV2Config",
        "first layer dense, experts in groups",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3Config",
        "first two layers dense, experts in groups, YaRN",
        {**DEEPSEEK, "first_k_dense_replace": 2, "rope_parameters": YARN},
    ),
    Family("Qwen3", "Qwen3Config", "query and key norms", {"head_dim": 8}),
    Family("Qwen3-MoE", "Qwen3MoeConfig", "one layer dense", {**SPARSE, "mlp_only_layers": [1], "head_dim": 8}),
    Family("Qwen3-Next", "Qwen3NextConfig", "experts, gated attention", {**SPARSE, **LINEAR}),
    Family("Gemma 3 text", "Gemma3TextConfig", "two rotary bases", {**THIRD_FULL, "head_dim": 8}),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        "sinks, experts, YaRN",
        {**ALTERNATE, "num_local_experts": 4, "head_dim": 8, "rope_parameters": YARN},
    ),
    Family("OLMo 2", "Olmo2Config", "norms after the blocks"),
    Family(
        "Granite",
        "GraniteConfig",
        "multipliers",
        {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    Family("GPT-NeoX", "GPTNeoXConfig", "partial rotary", {"rotary_pct": 0.5}),
    Family("SmolLM3", "SmolLM3Config", "two layers without rotary", {"no_rope_layers": [1, 0, 1, 0]}),
    Family("GLM-4", "Glm4Config", "partial rotary", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    Family("Cohere 2", "Cohere2Config", "full layer without rotary, scaled logits", {**THIRD_FULL, "logit_scale": 0.5}),
    Family(
        "Llama 4 text",
        "Llama4TextConfig",
        "layer without rotary, scores scaled by position, experts in every second layer",
        {
            "head_dim": 8,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0, 1, 1],
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "intermediate_size_mlp": 40,
            "floor_scale": 4,
        },
    ),
]
"""Promised: cut at every position into two stages, and at every pair of positions into three."""

OTHERS = [
    Family("Apertus", "ApertusConfig"),
    Family("Arcee", "ArceeConfig"),
    Family("Bamba", "BambaConfig", "", {**MAMBA, "attn_layer_indices": [2]}),
    Family("Cohere", "CohereConfig"),
    Family("CTRL", "CTRLConfig", "", {**GPT, "dff": 48}),
    Family("Ernie 4.5", "Ernie4_5Config", "", {"head_dim": 8}),
    Family("Ernie 4.5 MoE", "Ernie4_5_MoeConfig", "experts", {"moe_num_experts": 4, "moe_k": 2}),
    Family("EXAONE 4", "Exaone4Config", "", THIRD_FULL),
    Family("Falcon-H1", "FalconH1Config", "", {**MAMBA, "mamba_d_ssm": 64}),
    Family("GLM-4 MoE", "Glm4MoeConfig", "experts", {**SPARSE, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    Family("GPT-BigCode", "GPTBigCodeConfig", "multi-query", GPT),
    Family("Granite MoE", "GraniteMoeConfig", "experts", {"num_local_experts": 4}),
    Family(
        "Granite MoE hybrid",
        "GraniteMoeHybridConfig",
        "experts",
        {**MAMBA, "num_local_experts": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]},
    ),
    Family("Hunyuan dense", "HunYuanDenseV1Config", "", {"head_dim": 8}),
    Family("Hunyuan MoE", "HunYuanMoEV1Config", "experts", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    Family("InternLM 3", "InternLM3Config", "", {"head_dim": 8}),
    Family("LFM2", "Lfm2Config", "", {"layer_types": ["conv", "full_attention", "conv", "conv"]}),
    Family("MiniMax-M2", "MiniMaxM2Config", "experts", {**SPARSE, "num_local_experts": 4, "head_dim": 8}),
    Family("Ministral 3", "Ministral3Config", "", {"head_dim": 8, "sliding_window": 8}),
    Family(
        "Mistral 4",
        "Mistral4Config",
        "experts, scores scaled by position; AutoModelForCausalLM does not know it",
        {**DEEPSEEK, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    ),
    Family("Nemotron", "NemotronConfig"),
    Family("OLMo 3", "Olmo3Config", "", THIRD_FULL),
    Family("OLMoE", "OlmoeConfig", "experts", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("Phi-MoE", "PhimoeConfig", "experts", {"num_local_experts": 4, "sliding_window": 8}),
    Family("Qwen3.5 text", "Qwen3_5TextConfig", "", LINEAR),
    Family("Seed-OSS", "SeedOssConfig", "", {"head_dim": 8}),
    Family("StableLM", "StableLmConfig", "partial rotary"),
]
"""Not promised, but seen to work: in stages of one layer each."""


# Whose jobs cannot share a forward pass; `azu.models.packing` says why.
ALONE = {
    *("Llama, tied", "Phi-3"),
    *("GPT-Neo", "GPT-J", "BLOOM", "Falcon, old", "Falcon, 7B", "Falcon, new", "MPT", "StableLM"),
    *("Qwen3-Next", "Qwen3.5 text", "LFM2", "Falcon-H1", "Bamba", "Granite MoE hybrid"),
    *("Llama 4 text",),
}


def save(family: Family, directory: Path) -> None:
    """Saves a random model as the hub would have it. No weight is left at zero or one: every tensor counts."""
    torch.manual_seed(0)
    config = family.build_config()
    model = architecture(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.save_pretrained(directory)


def architecture(config: Any) -> Any:
    """The class that transformers maps a config to, or, where it maps none, the one that is named after it."""
    mapped = transformers.AutoModelForCausalLM._model_mapping
    name = type(config).__name__.removesuffix("Config")
    return mapped[type(config)] if type(config) in mapped else getattr(transformers, f"{name}ForCausalLM")


def table(families: list[Family]) -> str:
    """Returns a Markdown table of the families."""
    lines = ["| family | class | cache | jobs share a pass | besides |", "| --- | --- | --- | --- | --- |"]
    for family in families:
        config = family.build_config()
        shared = "no" if family.name in ALONE else "yes"
        columns = (family.name, f"`{architecture(config).__name__}`", _caches(config), shared, family.traits)
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _caches(config: Any) -> str:
    kinds = list(transformers.cache_utils.get_layer_types_and_kwargs(config)[0])
    if getattr(config, "kv_lora_rank", None):
        kinds = ["latent"]
    names = {
        "full_attention": "full",
        "sliding_attention": "sliding window",
        "chunked_attention": "chunks",
        "linear_attention": "linear state",
        "conv": "convolution",
        "hybrid": "full with linear state",
    }
    return ", ".join(dict.fromkeys(names.get(kind, kind) for kind in kinds))


if __name__ == "__main__":
    print(table(FAMILIES), table(OTHERS), sep="\n\n")
