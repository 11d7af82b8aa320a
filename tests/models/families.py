"""The families that the suite holds to parity, each as a small random model that exercises what is special in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Family"]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
    "rope_theta": 10000.0,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
DEEPSEEK = {**MLA, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 4}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class Family:
    """One row of the table: a family (or a variant), the class that it saves, and what its settings exercise."""

    name: str
    config: str
    traits: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""


FAMILIES = [
    Family("Llama", "LlamaConfig", "Llama 3 rope scaling", {"rope_parameters": LLAMA3}),
    Family("Llama, tied", "LlamaConfig", "tied head; dynamic NTK rope past the trained length", {"tie_word_embeddings": True, "rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
    Family("Mistral", "MistralConfig", "sliding window", {"sliding_window": 8}),
    Family("Mixtral", "MixtralConfig", "experts, sliding window", {"num_local_experts": 4, "sliding_window": 8}),
    Family("Qwen2", "Qwen2Config", "sliding window from layer 2 on", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    Family("Qwen2-MoE", "Qwen2MoeConfig", "experts in every second layer but one; shared expert", {**SPARSE, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6, "shared_expert_intermediate_size": 24}),
    Family("GPT-2", "GPT2Config", "learned positions, scaling by layer index", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True}),
    Family("GPT-Neo", "GPTNeoConfig", "local attention in some layers", {"num_layers": 4, "num_heads": 4, "attention_types": [[["global"], 1], [["local"], 1], [["global", "local"], 1]], "window_size": 8}),
    Family("GPT-J", "GPTJConfig", "partial rotary, parallel", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    Family("OPT", "OPTConfig", "positions with an offset, projections around the layers", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    Family("BLOOM", "BloomConfig", "ALiBi", {"n_layer": 4, "n_head": 4}),
    Family("Falcon, old", "FalconConfig", "multi-query, ALiBi", {"alibi": True, "multi_query": True, "parallel_attn": True}),
    Family("Falcon, rotary", "FalconConfig", "multi-query, rotary, parallel attention", {"alibi": False, "multi_query": True, "parallel_attn": True}),
    Family("Falcon, new", "FalconConfig", "grouped query, two norms", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("MPT", "MptConfig", "ALiBi", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}),
    Family("Phi", "PhiConfig", "partial rotary, parallel", {"partial_rotary_factor": 0.5}),
    Family("Phi-3", "Phi3Config", "longrope that switches at the trained length, sliding window", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 20}),
    Family("Gemma", "GemmaConfig", "scaled embeddings, tied", {"head_dim": 8}),
    Family("Gemma 2", "Gemma2Config", "alternating sliding window, soft caps", {"head_dim": 8, "sliding_window": 8}),
    Family("StarCoder2", "Starcoder2Config", "sliding window", {"sliding_window": 8}),
    Family("DeepSeek-V2", "DeepseekV2Config", "latent attention, first layers dense, grouped experts", {**DEEPSEEK, "topk_group": 2, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1, "n_shared_experts": 1}),
    Family("DeepSeek-V3", "DeepseekV3Config", "latent attention, first layers dense, YaRN", {**DEEPSEEK, "topk_group": 2, "first_k_dense_replace": 2, "rope_parameters": YARN}),
    Family("Qwen3", "Qwen3Config", "query and key norms", {"head_dim": 8}),
    Family("Qwen3-MoE", "Qwen3MoeConfig", "experts in all but one layer", {**SPARSE, "mlp_only_layers": [1], "head_dim": 8}),
    Family("Qwen3-Next", "Qwen3NextConfig", "linear attention, gated attention, experts", {**SPARSE, "layer_types": [LINEAR, LINEAR, FULL, LINEAR], "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 16}),
    Family("Gemma 3 text", "Gemma3TextConfig", "sliding pattern, two rotary bases", {"head_dim": 8, "sliding_window": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]}),
    Family("GPT-OSS", "GptOssConfig", "sinks, alternating sliding window, experts, YaRN", {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("OLMo 2", "Olmo2Config"),
    Family("Granite", "GraniteConfig", "multipliers", {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    Family("GPT-NeoX", "GPTNeoXConfig", "partial rotary, parallel residual", {"rotary_pct": 0.5}),
    Family("SmolLM3", "SmolLM3Config", "layers without rotary", {"no_rope_layers": [1, 0, 1, 0]}),
    Family("GLM-4", "Glm4Config", "partial rotary", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    Family("Cohere 2", "Cohere2Config", "sliding pattern, parallel, logit scale", {"sliding_window": 8, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]}),
    Family("Llama 4 text", "Llama4TextConfig", "chunked attention, layers without rotary, interleaved experts", {"head_dim": 8, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1, 1], "interleave_moe_layer_step": 2, "num_local_experts": 4, "intermediate_size_mlp": 40, "floor_scale": 4}),
]
