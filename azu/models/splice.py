"""A stage is a splice of the real model: a range of its decoder layers, run by the family's own forward.

`azu.models.surgery` says how a model is cut. Here a stage is resolved from its config, loaded from its files, and run.
transformers' own loader fills it, so that what differs between checkpoint and module (fused experts) is converted and
what no checkpoint holds (rotary frequencies) is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from azu.errors import InputError, InternalError, ModelError
from azu.models.checkpoint import LayerNames, read_tensors
from azu.models.surgery import LastLayerDone, spliced, state_names

__all__ = ["Stage", "StageSpec", "build_stage", "stage_tensor_names"]

# A config.json is data from a stranger: no key of it may choose code, kernels or quantisers.
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


@dataclass(frozen=True)
class StageSpec:
    """Layers start..end (end exclusive) of a model of `n_layers`, described by its HF config.json."""

    config: dict[str, Any]
    start: int
    end: int
    n_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= self.n_layers:
            raise ModelError(f"layers {self.start}..{self.end} of {self.n_layers} are no range", code="bad_layer_range")


def stage_tensor_names(spec: StageSpec) -> tuple[list[str], list[str]]:
    """Returns the names of a stage's tensors in its layers (as the whole model counts them) and outside of them.

    A tied head is named as the embedding that it is stored as. Costs no memory: the model stays on the meta device.

    Raises:
        ModelError: code "unsupported_architecture", "bad_config" or "bad_layer_range".
    """
    model = _outline(spec, *_resolve(spec))
    container = model.azu_container
    layers, shared = [], set()
    for name in state_names(model):
        if name.startswith(container):
            index, rest = name.removeprefix(container).split(".", 1)
            layers.append(f"{container}{int(index) + spec.start}.{rest}")
        else:
            shared.add(model.azu_tied.get(name, name))
    return layers, sorted(shared)


def build_stage(
    spec: StageSpec,
    dtype: torch.dtype,
    device: torch.device | str,
    tensors_from: Mapping[str, Path] | Iterable[Path],
) -> Stage:
    """Loads a stage.

    Args:
        dtype: what weights are cast to and what the stage computes in.
        tensors_from: the safetensors files that hold the stage's tensors, or a mapping whose values they are. Tensors
            that the stage does not need are skipped.

    Raises:
        ModelError: code "missing_tensor" where the files do not hold all, "bad_weights" where shapes differ, and as
            `stage_tensor_names`.
    """
    paths = list(tensors_from.values()) if isinstance(tensors_from, Mapping) else list(tensors_from)
    family, config = _resolve(spec)
    state = _state(_outline(spec, family, copy.deepcopy(config)), spec, paths, dtype)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # no annotation upstream
    try:
        model, report = spliced(family, spec.start, spec.end, spec.n_layers).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"the weights do not fit the model ({error})", code="bad_weights") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise ModelError(f"the files lack {missing}", code="missing_tensor", remedy="Fetch the stage's files again.")
    return Stage(spec, model.requires_grad_(requires_grad=False).to(device))


def _outline(spec: StageSpec, family: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """The stage on the meta device: names and shapes, no memory."""
    try:
        with torch.device("meta"):
            return spliced(family, spec.start, spec.end, spec.n_layers)(config)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise ModelError(f"{family.__name__} cannot be built from its config ({error})", code="bad_config") from error


def _state(outline: Any, spec: StageSpec, paths: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """This stage's state dict: tied heads whose embedding lives in another stage get the embedding's tensor."""
    stored = {name: outline.azu_tied.get(name, name) for name in state_names(outline)}
    shared = {source for name, source in stored.items() if not name.startswith(outline.azu_container)}
    layers = LayerNames(outline.azu_container, spec.start, spec.end)
    full_precision = outline._keep_in_fp32_modules | outline._keep_in_fp32_modules_strict
    state = read_tensors(paths, layers, shared, dtype=dtype, uncast=full_precision)
    for name, source in stored.items():
        if name != source and source in state:
            state[name] = state[source] if source in stored else state.pop(source)
    return state


class Stage:
    """A loaded stage; made by `build_stage`. Not safe for concurrent use: one thread per device runs it."""

    def __init__(self, spec: StageSpec, model: Any) -> None:
        self.spec = spec
        self.is_first = spec.start == 0
        self.is_last = spec.end == spec.n_layers
        self.hidden_size: int = model.config.hidden_size
        self.model: PreTrainedModel = model
        self._base = model.base_model
        self._device = next(model.parameters()).device

    def new_cache(self) -> Cache:
        """Returns an empty KV cache for this stage's layers."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def forward(self, inputs: torch.Tensor, cache: Cache, position: int) -> torch.Tensor:
        """Runs n tokens of one job through the stage and appends them to its cache.

        Args:
            inputs: int64 token ids [n] in the first stage, hidden states [n, hidden] in the others.
            cache: from `new_cache`.
            position: how many tokens the cache holds.

        Returns:
            Hidden states [n, hidden], or in the last stage the logits [1, vocab] of the last token.

        Raises:
            InputError: code "bad_stage_input", where shape or dtype differ.
        """
        self._check(inputs)
        positions = torch.arange(position, position + inputs.shape[0], device=self._device).unsqueeze(0)
        arguments = {"past_key_values": cache, "use_cache": True, "position_ids": positions}
        if self.is_first:
            arguments["input_ids"] = inputs.unsqueeze(0)
        else:
            arguments["inputs_embeds"] = self.model.azu_incoming = inputs.unsqueeze(0)
        if self.is_last:
            logits: torch.Tensor = self.model(**arguments, logits_to_keep=1).logits
            return logits[0, -1:]
        try:
            self._base(**arguments)
        except LastLayerDone as done:
            return done.hidden[0]
        raise InternalError("the forward pass ended without reaching the stage's last layer")

    def cache_bytes(self, cache: Cache) -> int:
        """Returns the memory that a cache's keys and values take, in bytes."""
        layers: list[Any] = list(cache.layers)
        held = (getattr(layer, part, None) for layer in layers for part in ("keys", "values"))
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _check(self, inputs: torch.Tensor) -> None:
        if self.is_first:
            fits = inputs.ndim == 1 and inputs.dtype == torch.int64
        else:
            fits = inputs.ndim == 2 and inputs.shape[1] == self.hidden_size and inputs.dtype == self.model.dtype
        if not fits or not inputs.shape[0]:
            problem = f"a stage cannot take {inputs.dtype} of shape {list(inputs.shape)}"
            raise InputError(problem, code="bad_stage_input")


def _resolve(spec: StageSpec) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    given = {key: value for key, value in spec.config.items() if key not in _REFUSED_KEYS and not key.startswith("_")}
    if given.get("quantization_config"):
        raise ModelError("quantised checkpoints are not supported", code="unsupported_quantization")
    architecture = (given.get("architectures") or ["none"])[0]
    model_type = given.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **given)
        family: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unsupported(architecture) from error
    if family.__name__ != architecture:
        raise _unsupported(architecture)
    if config.num_hidden_layers != spec.n_layers:
        problem = f"config.json has {config.num_hidden_layers} layers, not {spec.n_layers}"
        raise ModelError(problem, code="bad_config")
    config._attn_implementation = "sdpa" if family._supports_sdpa else "eager"
    return family, config


def _unsupported(architecture: str) -> ModelError:
    remedy = "Only causal language models that transformers implements can be served."
    return ModelError(f"architecture {architecture} is not supported", code="unsupported_architecture", remedy=remedy)
