"""What a manifest says about a model's shape, read out of its config.json under the names that families give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from azu.errors import ModelError
from azu.models.manifest import MAX_LAYERS, LayerCache

__all__ = ["ConfigFacts", "read_facts"]

_NAMES: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "vocab_size": ("vocab_size",),
}
_UNBOUNDED_CONTEXT = 2048  # ALiBi families name no limit; this is what they were trained with


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """Shape of a model; `caches` says what each layer keeps of a job."""

    architecture: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    caches: tuple[LayerCache, ...]
    tied: bool | None


def read_facts(config: Mapping[str, Any]) -> ConfigFacts:
    """Reads the facts.

    Raises:
        ModelError: code "bad_config" where one is missing or not a positive integer; "unsupported_quantization" where
            the weights are packed in a way that only one library can unpack.
    """
    if config.get("quantization_config"):
        remedy = "Publish the unquantised repository."
        raise ModelError("the model's weights are quantised", code="unsupported_quantization", remedy=remedy)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise _bad("it names no architecture")
    n_layers = _positive(config, "n_layers")
    if n_layers > MAX_LAYERS:  # before anything is laid out for them
        raise _bad(f"it has more than {MAX_LAYERS} layers")
    return ConfigFacts(
        architecture=architectures[0],
        n_layers=n_layers,
        hidden_size=_positive(config, "hidden_size"),
        vocab_size=_positive(config, "vocab_size"),
        context_length=_positive(config, "context_length", _UNBOUNDED_CONTEXT),
        caches=(LayerCache(_kv_values(config)),) * n_layers,
        tied=_boolean(config.get("tie_word_embeddings")),
    )


def _kv_values(config: Mapping[str, Any]) -> int:
    heads = _positive(config, "heads")
    head_dim = config.get("head_dim") or _positive(config, "hidden_size") // heads
    latent, rope = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if isinstance(latent, int) and isinstance(rope, int):  # DeepSeek caches one compressed vector for all heads
        return latent + rope
    if not isinstance(head_dim, int) or head_dim < 1:
        raise _bad("its head_dim is malformed")
    return 2 * _kv_heads(config, heads) * head_dim


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon 7B
        return 1
    return _positive(config, "kv_heads", heads)


def _positive(config: Mapping[str, Any], fact: str, default: int | None = None) -> int:
    value = next((config[name] for name in _NAMES[fact] if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(f"it lacks a valid {_NAMES[fact][0]}")
    return value


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _bad(problem: str) -> ModelError:
    return ModelError(f"config.json cannot be used: {problem}", code="bad_config")
