"""Which transformers class a config.json names, and whether a stage can be cut out of it.

A config.json is data from a stranger: no key of it may choose code, kernels or quantisers, and no number in it may make
transformers build more than any real model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from azu.errors import ModelError

__all__ = ["on_meta", "resolve", "unsupported"]

_REFUSED_KEYS = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "experts_implementation",
        "fusion_config",
        "custom_generate",
        "custom_pipelines",
    }
)
MAX_PARAMETERS = 16_384  # tensors in a model: 200 layers of 80; experts lie together in few
_MAX_VALUES = 100_000  # in a config.json, all of its lists together
_MAX_DEPTH = 16
_MAX_NUMBER = 1 << 32  # vocabulary, context and widths: far above any model
_MAX_COUNT = 1 << 12  # of layers, experts and heads: lists, modules and tables are made by these
_COUNTED = ("layer", "layers", "experts", "head", "heads", "head_kv")  # how their keys end
# What is allocated by, whatever the weights: configs name each label, state-space layers pad a prompt to their chunk
# and take its square, MPT computes biases for the whole context.
_LIMITS = {"attention_types": _MAX_COUNT, "num_labels": _MAX_COUNT, "max_seq_len": 1 << 20}
_LIMITS |= dict.fromkeys(("chunk_size", "mamba_chunk_size"), 1 << 10)
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as transformers writes them
_SPECIAL = {  # what neither the config nor the forward shows
    "RecurrentGemmaForCausalLM": "its layers keep the state of one job in themselves",
    "Gemma4ForCausalLM": "its rotary tables are computed from the kinds of all of its layers",
    "Gemma4UnifiedForCausalLM": "its rotary tables are computed from the kinds of all of its layers",
    "JambaForCausalLM": "its layers begin anew at each chunk of a prompt",
    "ModernBertDecoderForCausalLM": "loading one stage touches modules of others",
}


def resolve(raw: Mapping[str, Any], n_layers: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Returns the class and the config of a causal language model of `n_layers` layers.

    The class is the one that `architectures` names: transformers' own for this kind of config, or another causal
    language model of transformers that takes such a config.

    Raises:
        ModelError: code "unsupported_architecture", "unsupported_quantization" or "bad_config".
    """
    given = _bounded(raw)
    if given.get("quantization_config"):
        raise ModelError("quantised checkpoints are not supported", code="unsupported_quantization")
    architecture = _architecture(given)
    model_type = given.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise unsupported(architecture, f"transformers has no model type {model_type!r:.64}")
    if isinstance(given.get("text_config"), Mapping):
        raise unsupported(
            architecture,
            "it takes images or audio",
            remedy="Publish its language model: load the text class (as Gemma3ForCausalLM) and save_pretrained it.",
        )
    family, config = _guarded("its config cannot be read", lambda: _read(architecture, model_type, given))
    stated = getattr(config, "num_hidden_layers", None)
    if stated != n_layers:
        raise _bad(f"it has {stated} layers, not {n_layers}")
    return family, config


def on_meta(build: Callable[[], Any], what: str) -> Any:
    """Returns what `build` makes on the meta device, where tensors take no memory.

    Raises:
        ModelError: code "bad_config", where it fails, or makes more than `MAX_PARAMETERS` tensors.
    """
    with torch.device("meta"), _few_parameters():
        return _guarded(f"{what} cannot be built from its config", build)


def unsupported(architecture: str, reason: str, remedy: str = "") -> ModelError:
    """Returns the error that refuses an architecture by name."""
    remedy = remedy or "docs/models.md lists the families that can be served."
    problem = f"architecture {architecture} is not supported: {reason}"
    return ModelError(problem, code="unsupported_architecture", remedy=remedy)


def _guarded(problem: str, work: Callable[[], Any]) -> Any:
    """Runs transformers' code over a stranger's config, where anything may be raised."""
    try:
        return work()
    except ModelError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:200]
        raise ModelError(f"{problem} ({type(error).__name__}: {detail})", code="bad_config") from error


@contextmanager
def _few_parameters() -> Iterator[None]:
    """Stops a build that a config inflates: experts in a list of modules, prediction heads and the like."""
    left = MAX_PARAMETERS

    def count(_module: object, name: str, _parameter: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ModelError(f"the model has more than {MAX_PARAMETERS} tensors", code="bad_config")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _bounded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the refused keys, at any depth.

    Raises:
        ModelError: code "bad_config", where it has more values, or larger ones, than any model.
    """
    left = _MAX_VALUES

    def copy(value: Any, key: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _MAX_DEPTH:
            raise _bad(f"it holds more than {_MAX_VALUES} values, or nests them more than {_MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            tag = value.get("__float__")
            if isinstance(tag, str) and tag in _FLOATS:
                return _FLOATS[tag]
            return {name: copy(item, str(name), depth + 1) for name, item in value.items() if _allowed(name)}
        if isinstance(value, list):
            return [copy(item, key, depth + 1) for item in value]
        if isinstance(value, int) and abs(value) > _limit(key):
            raise _bad(f"{key:.64} is {value!r:.32}")
        return value

    if not isinstance(raw, Mapping):
        raise _bad("it is not a JSON object")
    return dict(copy(raw, "", 0))


def _allowed(key: str) -> bool:
    return key not in _REFUSED_KEYS and not str(key).startswith("_")


def _limit(key: str) -> int:
    return _LIMITS.get(key, _MAX_COUNT if key.endswith(_COUNTED) else _MAX_NUMBER)


def _architecture(given: Mapping[str, Any]) -> str:
    names = given.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if not isinstance(first, str) or not first.isidentifier() or len(first) > 128:
        raise unsupported("none", "config.json names no architecture")
    return first


def _read(architecture: str, model_type: str, given: dict[str, Any]) -> tuple[Any, PreTrainedConfig]:
    config = AutoConfig.for_model(model_type, **given)
    family = _family(architecture, config)
    _refuse_special(family, config)
    config._attn_implementation = "sdpa" if family._supports_sdpa else "eager"
    return family, config


def _family(architecture: str, config: PreTrainedConfig) -> Any:
    family: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if family is None or family.__name__ != architecture:
        family = getattr(transformers, architecture, None)
        if not isinstance(family, type) or not issubclass(family, PreTrainedModel):
            raise unsupported(architecture, "transformers has no such model")
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise unsupported(architecture, "it is no decoder-only language model")
        if family.config_class is not type(config):
            raise unsupported(architecture, f"it does not take the config of a {config.model_type} model")
    return family


def _refuse_special(family: Any, config: PreTrainedConfig) -> None:
    """What the config or the class says plainly; what only the forward shows is refused by `azu.models.observe`."""
    name = family.__name__
    if name in _SPECIAL:
        raise unsupported(name, _SPECIAL[name])
    if getattr(config, "is_encoder_decoder", False) or not issubclass(family, GenerationMixin):
        raise unsupported(name, "it is no decoder-only language model")
    masked = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if masked or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise unsupported(name, "its tokens see the ones that follow them")
    if config.is_heterogeneous:  # its layers are looked up by their index in the whole model
        raise unsupported(name, "it has settings for single layers (per_layer_config)")
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise unsupported(name, "later layers read the KV cache of earlier ones")


def _bad(problem: str) -> ModelError:
    return ModelError(f"config.json cannot be used: {problem}", code="bad_config")
