"""Settings that several small models of `families` share."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ALTERNATE",
    "DEEPSEEK",
    "DYNAMIC",
    "GPT",
    "LINEAR",
    "LLAMA3",
    "LONGROPE",
    "MAMBA",
    "SPARSE",
    "THIRD_FULL",
    "YARN",
]

Settings = dict[str, Any]

GPT: Settings = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}

# Rotary scaling; the prompt has 11 tokens and the answer 16, so that the kinds that depend on the length change midway.
YARN: Settings = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
DYNAMIC: Settings = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3: Settings = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
LONGROPE: Settings = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
    "rope_theta": 10000.0,
}

SPARSE: Settings = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
DEEPSEEK: Settings = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
}

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
ALTERNATE: Settings = {"sliding_window": 8, "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]}
THIRD_FULL: Settings = {"sliding_window": 8, "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING]}
LINEAR: Settings = {
    "head_dim": 8,
    "layer_types": [_LINEAR, _LINEAR, _FULL, _LINEAR],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA: Settings = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
