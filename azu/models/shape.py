"""What a layer keeps of each job and what running it takes, read out of config.json, family by family. Pure.

The rules are transformers' own, measured with release 5.23 (tests/models/test_shape.py measures them again):

- A layer caches a key and a value for each KV head. Latent attention (DeepSeek) caches one compressed vector for all
  heads; Falcon's new architecture repeats its KV heads for all heads before it caches them.
- `layer_types` names each layer's kind; older repositories leave it out, and the config class of some families then
  fills it in by a pattern of its own. Where it stays out, `sliding_window` makes every layer a sliding one.
- Linear attention keeps a state of fixed size instead: a convolution's last inputs, and a matrix for each head. Where
  families mix in state-space layers (Mamba) by rules of their own, every layer counts as both: too much, but safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from azu.errors import ModelError
from azu.models.manifest import LayerCache, Workspace

__all__ = ["layer_caches", "workspace"]

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_MLP = ("intermediate_size", "intermediate_size_mlp", "n_inner", "ffn_dim", "ffn_hidden_size")
_CONTEXT = ("max_position_embeddings", "n_positions")
# Every n-th layer attends to everything, the others to a window (or are linear): by model type, n and who says so.
_PATTERNS: Mapping[str, tuple[int, str]] = {
    "gemma2": (2, "sliding_window_pattern"),
    "gemma3_text": (6, "sliding_window_pattern"),
    "cohere2": (4, "sliding_window_pattern"),
    "gpt_oss": (2, "sliding_window_pattern"),
    "qwen3_next": (4, "full_attention_interval"),
    "llama4_text": (4, "no_rope_layer_interval"),
}
# Whose attention writes all scores to memory; the others' goes through torch's fused kernel.
_UNFUSED = frozenset({"gpt_neo", "gptj", "bloom", "mpt", "gpt_oss"})
_FLOAT = 4  # bytes; scores and states are float32 whatever the dtype


def layer_caches(config: Mapping[str, Any], n_layers: int) -> tuple[LayerCache, ...]:
    """What each of `n_layers` layers keeps of one job.

    Raises:
        ModelError: code "bad_config", where a number is missing or malformed.
    """
    window = _number(config, ("attention_chunk_size",), 0) or _window(config)
    full = LayerCache(_cached_values(config), 0, _state_space_bytes(config))
    state = _state_bytes(config)
    linear = LayerCache(0, 0, state) if state else full
    kinds = {"full": full, "window": LayerCache(_cached_values(config), window), "linear": linear}
    return tuple(kinds[kind] for kind in _kinds(config, n_layers, has_window=window > 0))


def workspace(config: Mapping[str, Any]) -> Workspace:
    """What running the largest layer takes.

    Raises:
        ModelError: code "bad_config", where a number is missing or malformed.
    """
    heads, width = _heads(config), _head_dim(config)
    kv_heads = _number(config, _KV_HEADS, heads)
    latent = _number(config, ("kv_lora_rank",), 0)
    # Latent attention's keys are wider than its values, which the fused kernel does not take.
    unfused = str(config.get("model_type")) in _UNFUSED or bool(config.get("attn_logit_softcapping")) or latent > 0
    if latent:
        key = _number(config, ("qk_nope_head_dim",), width) + _number(config, ("qk_rope_head_dim",), 0)
        value = _number(config, ("v_head_dim",), width)
        attention, token = heads * (3 * key + 2 * value), heads * 2 * (key + value)
    else:
        attention, token = (4 * heads + 4 * kv_heads) * width, 2 * heads * width if kv_heads < heads or unfused else 0
    linear = sum(_linear_widths(config))
    return Workspace(
        mlp=_mlp_values(config),
        attention=max(attention, 10 * linear),  # the reference kernel of linear attention keeps about ten copies
        token=token,
        pair=1 + _FLOAT + (2 * _FLOAT * heads if unfused else 0),  # the mask; scores before and after the softmax
        tables=_table_bytes(config),
        fused=int(_experts(config) > 0),
    )


def _kinds(config: Mapping[str, Any], n_layers: int, *, has_window: bool) -> list[str]:
    windowed = "window" if has_window else "full"
    names = {"linear_attention": "linear", "sliding_attention": windowed, "chunked_attention": windowed}
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == n_layers:
        return [names.get(str(kind), "full") for kind in types]
    model_type = str(config.get("model_type"))
    if model_type in _PATTERNS:
        every, name = _PATTERNS[model_type]
        every = _number(config, (name, f"_{name}"), every)
        other = "linear" if model_type == "qwen3_next" else windowed
        return ["full" if (index + 1) % every == 0 else other for index in range(n_layers)]
    # Qwen's configs carry a window that counts only if it is switched on, and then for some layers: all tokens is safe.
    return ["full" if "use_sliding_window" in config else windowed] * n_layers


def _window(config: Mapping[str, Any]) -> int:
    return _number(config, ("sliding_window",), 0)


def _cached_values(config: Mapping[str, Any]) -> int:
    latent, rope = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if isinstance(latent, int) and isinstance(rope, int):
        return latent + rope
    return 2 * _cached_heads(config) * _head_dim(config)


def _cached_heads(config: Mapping[str, Any]) -> int:
    heads = _heads(config)
    if config.get("model_type") != "falcon":
        return _number(config, _KV_HEADS, heads)
    return 1 if config.get("multi_query", True) and not config.get("new_decoder_architecture") else heads


def _linear_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers per token in the keys and queries, and in the values of a linear layer; zeros where there is none."""
    if "linear_num_key_heads" not in config:
        return 0, 0
    keys = _number(config, ("linear_num_key_heads",)) * _number(config, ("linear_key_head_dim",))
    values = _number(config, ("linear_num_value_heads",)) * _number(config, ("linear_value_head_dim",))
    return 2 * keys, values


def _state_bytes(config: Mapping[str, Any]) -> int:
    """The convolution's inputs count as float32 too: an upper bound of what is a small part."""
    keys, values = _linear_widths(config)
    if not values:
        return 0
    inputs = (keys + values) * _number(config, ("linear_conv_kernel_dim",), 4)
    return _FLOAT * (inputs + values * _number(config, ("linear_key_head_dim",)))


def _state_space_bytes(config: Mapping[str, Any]) -> int:
    hidden = _number(config, _HIDDEN)
    if "mamba_d_state" not in config:
        return _FLOAT * hidden * _number(config, ("conv_L_cache",), 0)  # LFM2: a short convolution and nothing else
    state = _number(config, ("mamba_d_state",))
    inner = max(_number(config, ("mamba_d_ssm",), 0), _number(config, ("mamba_expand",), 2) * hidden)
    inputs = inner + 2 * state * _number(config, ("mamba_n_groups",), 1)
    return _FLOAT * (inner * state + inputs * _number(config, ("mamba_d_conv",), 4))


def _mlp_values(config: Mapping[str, Any]) -> int:
    """Four numbers for each hidden one: gate, up, their product and an activation function's intermediate."""
    hidden = _number(config, _HIDDEN)
    dense = max((_number(config, (name,), 0) for name in _MLP), default=0) or 4 * hidden
    experts = _experts(config)
    if not experts:
        return 4 * dense
    width = _number(config, ("moe_intermediate_size",), dense)
    chosen = _number(config, ("num_experts_per_tok", "moe_topk"), 1)
    shared = _number(config, ("shared_expert_intermediate_size",), 0)
    shared = shared or width * _number(config, ("n_shared_experts",), 0)
    return max(4 * dense, chosen * (3 * hidden + 5 * width) + 4 * shared + 3 * experts)


def _experts(config: Mapping[str, Any]) -> int:
    return _number(config, ("num_experts", "num_local_experts", "n_routed_experts"), 0)


def _table_bytes(config: Mapping[str, Any]) -> int:
    context = _number(config, _CONTEXT, 0)
    if config.get("model_type") == "gpt_neo":  # a causal mask of booleans
        return context * context
    if config.get("model_type") == "gptj":  # sines and cosines
        return context * _number(config, ("rotary_dim",), _number(config, _HIDDEN)) * _FLOAT
    return 0


def _heads(config: Mapping[str, Any]) -> int:
    return _number(config, _HEADS)


def _head_dim(config: Mapping[str, Any]) -> int:
    return _number(config, ("head_dim",), 0) or _number(config, _HIDDEN) // _heads(config)


def _number(config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    """The first of these that the config has; absent and null are the same."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or not (default == 0 <= value or value > 0):
        raise ModelError(f"config.json cannot be used: it lacks a valid {names[0]}", code="bad_config")
    return value
