"""What a manifest says about a model's shape, read out of its config.json under the names that families give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from azu.errors import ModelError
from azu.models.manifest import MAX_LAYERS, LayerCache, Workspace
from azu.models.shape import layer_caches, workspace

__all__ = ["ConfigFacts", "read_facts"]

_NAMES: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "vocab_size": ("vocab_size",),
}
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers names decoder-only language models
_UNBOUNDED_CONTEXT = 2048  # ALiBi families name no limit; this is what they were trained with


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """Shape of a model; `caches` says what each layer keeps of a job, `workspace` what running it takes."""

    architecture: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    caches: tuple[LayerCache, ...]
    workspace: Workspace
    tied: bool | None


def read_facts(config: Mapping[str, Any]) -> ConfigFacts:
    """Reads the facts.

    Raises:
        ModelError: code "bad_config" where one is missing or not a positive integer; "unsupported_architecture"
            where it is no decoder-only language model; "unsupported_quantization" where the weights are packed in a
            way that only one library can unpack.
    """
    if config.get("quantization_config"):
        remedy = "Publish the unquantised repository."
        raise ModelError("the model's weights are quantised", code="unsupported_quantization", remedy=remedy)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise _bad("it names no architecture")
    if not architectures[0].endswith(_CAUSAL) or config.get("is_encoder_decoder"):
        remedy = f"Publish a model whose architecture ends in {_CAUSAL[0]}; of one that takes images, its text model."
        problem = f"{architectures[0][:100]} is not a decoder-only language model"
        raise ModelError(problem, code="unsupported_architecture", remedy=remedy)
    n_layers = _positive(config, "n_layers")
    if n_layers > MAX_LAYERS:  # before anything is laid out for them
        raise _bad(f"it has more than {MAX_LAYERS} layers")
    try:
        caches, space = layer_caches(config, n_layers), workspace(config)
    except ModelError as error:
        raise error if error.code == "bad_config" else _bad("a number in it is out of range") from error
    return ConfigFacts(
        architecture=architectures[0],
        n_layers=n_layers,
        hidden_size=_positive(config, "hidden_size"),
        vocab_size=_positive(config, "vocab_size"),
        context_length=_positive(config, "context_length", _UNBOUNDED_CONTEXT),
        caches=caches,
        workspace=space,
        tied=_boolean(config.get("tie_word_embeddings")),
    )


def _positive(config: Mapping[str, Any], fact: str, default: int | None = None) -> int:
    value = next((config[name] for name in _NAMES[fact] if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(f"it lacks a valid {_NAMES[fact][0]}")
    return value


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _bad(problem: str) -> ModelError:
    remedy = "Choose a repository that transformers loads as it is."
    return ModelError(f"config.json cannot be used: {problem}", code="bad_config", remedy=remedy)
