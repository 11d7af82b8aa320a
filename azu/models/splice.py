"""A stage is a splice of the real model: a range of its decoder layers, run by the family's own forward.

`azu.models.surgery` says how a model is cut. Here a stage is resolved from its config, loaded from its files, and run.
transformers' own loader fills it, so that what differs between checkpoint and module (fused experts) is converted and
what no checkpoint holds (rotary frequencies) is computed.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicLayer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from azu.errors import InputError, InternalError, ModelError
from azu.models.architecture import on_meta, resolve
from azu.models.cache import ReservedLayer, new_cache
from azu.models.checkpoint import LayerNames, StoredTensor, open_stored
from azu.models.packing import PACKED, Pack, can_pack
from azu.models.quantize import HeldWeights
from azu.models.slots import Slots, has_slots
from azu.models.surgery import LastLayerDone, part_of, spliced, state_names

__all__ = ["Part", "Stage", "StageSpec", "build_stage", "stage_tensor_names"]

# transformers' loader reads ahead in threads: all experts of a stage would lie in memory before the first are fused.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
_SLACK_VALUES = 1 << 20  # tied tensors count twice, and small models round up
_MAX_COMPUTED_BYTES = 4 << 30  # rotary tables and masks; GPT-Neo's masks, the largest, take 4 MiB in each layer


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
    model = _outline(spec, *resolve(spec.config, spec.n_layers))
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
    held: HeldWeights | None = None,
) -> Stage:
    """Loads a stage.

    Args:
        dtype: what weights are cast to and what the stage computes in.
        tensors_from: the safetensors files that hold the stage's tensors, or a mapping whose values they are. Tensors
            that the stage does not need are skipped.
        held: how linear layers' weights are held (`azu.models.quantize`); as they are read where omitted.

    Raises:
        ModelError: code "missing_tensor" where the files do not hold all, "bad_weights" where shapes differ, and as
            `stage_tensor_names`.
        torch.OutOfMemoryError: the device's memory does not suffice.
    """
    paths = list(tensors_from.values()) if isinstance(tensors_from, Mapping) else list(tensors_from)
    family, config = resolve(spec.config, spec.n_layers)
    outline = _outline(spec, family, copy.deepcopy(config))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # no annotation upstream
    try:
        with _state(outline, spec, paths, dtype) as state:
            _check_size(outline, state)
            if held is not None:
                held.take_head(outline, state)
            model, report = spliced(family, spec.start, spec.end, spec.n_layers).from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                quantization_config=held,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        if held is not None and held.out_of_memory is not None:  # which the loader hides in its report
            raise held.out_of_memory from error
        raise ModelError(f"the weights do not fit the model ({error})", code="bad_weights") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise ModelError(f"the files lack {missing}", code="missing_tensor", remedy="Fetch the stage's files again.")
    return Stage(spec, model.requires_grad_(requires_grad=False).to(device))


def _outline(spec: StageSpec, family: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """The stage on the meta device: names and shapes, no memory."""
    cut = spliced(family, spec.start, spec.end, spec.n_layers)
    return on_meta(lambda: cut(config), family.__name__)


@contextmanager
def _state(outline: Any, spec: StageSpec, paths: list[Path], dtype: torch.dtype) -> Iterator[dict[str, StoredTensor]]:
    """This stage's state dict: a tied head whose embedding lives in another stage gets the embedding's tensor."""
    stored = {name: outline.azu_tied.get(name, name) for name in state_names(outline)}
    shared = {source for name, source in stored.items() if not name.startswith(outline.azu_container)}
    layers = LayerNames(outline.azu_container, spec.start, spec.end)
    full_precision = outline._keep_in_fp32_modules | outline._keep_in_fp32_modules_strict
    with open_stored(paths, layers, shared, dtype=dtype, uncast=full_precision) as state:
        for name, source in stored.items():
            if name != source and source in state and source not in stored:
                state[name] = state.pop(source)
        yield state


def _check_size(outline: Any, state: Mapping[str, StoredTensor]) -> None:
    """Before the loader allocates what the config asks for: that has to be about what the files hold."""
    stated = outline.state_dict()
    asked = sum(map(torch.numel, stated.values()))
    held = sum(math.prod(tensor.file[tensor.name].shape) for tensor in state.values())
    if asked > 2 * held + _SLACK_VALUES:
        raise ModelError(f"config.json asks for {asked} weights, the files hold {held}", code="bad_weights")
    computed = sum(buffer.nbytes for name, buffer in outline.named_buffers() if name not in stated)
    if computed > _MAX_COMPUTED_BYTES:
        raise ModelError(f"the model computes tables of {computed} bytes", code="bad_config")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some tokens of one job, as `Stage.forward` takes them."""

    inputs: torch.Tensor
    cache: Cache
    position: int


class Stage:
    """A loaded stage, made by `build_stage`, or a part of one.

    Not safe for concurrent use: one thread per device runs it and its parts.
    """

    def __init__(self, spec: StageSpec, model: Any) -> None:
        self.spec = spec
        self.is_first = spec.start == 0
        self.is_last = spec.end == spec.n_layers
        self.hidden_size: int = model.config.hidden_size
        self.model: PreTrainedModel = model
        self._incoming: Any = getattr(model, "azu_incoming", None)  # in all stages but the first
        self._device = next(model.parameters()).device
        self._dtype: torch.dtype = model.dtype  # the model looks for it each time
        self._solo: str = model.config._attn_implementation  # of a job by itself
        self._attention = self._solo  # now
        self._slots: Slots | None = None
        self.can_pack = can_pack(model, self.new_cache())
        if self.can_pack and has_slots(self._device):
            self._slots = Slots()

    def part(self, start: int, end: int) -> Stage:
        """Returns layers start..end alone (as the whole model counts them), over the same tensors.

        It is what `build_stage` makes of that range, and costs no memory but its modules'. Caches are its own.

        Raises:
            ModelError: code "bad_layer_range", where this stage does not hold them all.
        """
        first, last = self.spec.start, self.spec.end
        if not first <= start < end <= last:
            problem = f"layers {start}..{end} are no range of {first}..{last}, which are loaded"
            raise ModelError(problem, code="bad_layer_range")
        self._attend_by(self._solo)
        return Stage(replace(self.spec, start=start, end=end), part_of(self.model, start - first, end - first))

    def new_cache(self, tokens: int = 0) -> Cache:
        """Returns an empty KV cache for this stage's layers, with room for `tokens` and growing where more come."""
        cache = new_cache(self.model.config, tokens, self._slots.take() if self._slots else None)
        # Families ask their first attention layer for a length. Where all layers are linear, nobody uses the answer,
        # but there has to be one.
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]  # no annotation upstream
        return cache

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
        positions = torch.arange(position, position + inputs.shape[0], device=self._device)
        self._attend_by(self._solo)
        return self._run(inputs, positions, cache, 1)

    @torch.inference_mode()
    def forward_pack(self, parts: Sequence[Part]) -> torch.Tensor:
        """Runs some tokens of each of several jobs in one forward pass; only where the family `can_pack`.

        Returns:
            Hidden states [tokens of all parts, hidden] in the parts' order, or in the last stage the logits
            [parts, vocab] of each part's last token: as `forward` gives them but for the order in which kernels sum.

        Raises:
            InputError: code "bad_stage_input", where shape or dtype differ.
        """
        for part in parts:
            self._check(part.inputs)
        rows = [len(part.inputs) for part in parts]
        positions = [each.position + row for each in parts for row in range(len(each.inputs))]
        lasts = torch.tensor(rows, device=self._device).cumsum(0) - 1 if self.is_last else 1
        inputs = torch.cat([part.inputs for part in parts]) if len(parts) > 1 else parts[0].inputs
        self._attend_by(PACKED)
        with (pack := Pack([part.cache for part in parts], rows)):
            return self._run(inputs, torch.tensor(positions, device=self._device), pack, lasts)

    def _attend_by(self, attention: str) -> None:
        """Sets transformers' attention function; only where it differs, since that goes through all of the config."""
        if attention != self._attention:
            self.model.config._attn_implementation = self._attention = attention

    def _run(
        self, inputs: torch.Tensor, positions: torch.Tensor, cache: Cache, logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor:
        arguments = {"past_key_values": cache, "use_cache": True, "position_ids": positions.unsqueeze(0)}
        if self.is_first:
            arguments["input_ids"] = inputs.unsqueeze(0)
        else:
            self._incoming.hidden = inputs.unsqueeze(0)
            arguments["inputs_embeds"] = inputs.unsqueeze(0).clone()  # some families scale their embeddings in place
        try:
            logits: torch.Tensor = self.model(**arguments, logits_to_keep=logits_to_keep).logits
        except LastLayerDone as done:
            return done.hidden[0]
        if not self.is_last:
            raise InternalError("the forward pass ended without reaching the stage's last layer")
        return logits[0, -1:] if isinstance(logits_to_keep, int) else logits[0]

    def cache_bytes(self, cache: Cache) -> int:
        """Returns the memory that a cache takes, in bytes: keys and values, and the state of linear attention.

        Counts whole storages: a sliding window is a view of what its last step was computed from, until the next one.
        """
        reserved = [layer for layer in cache.layers if isinstance(layer, ReservedLayer)]
        tensors = (tensor for layer in cache.layers if layer not in reserved for tensor in _tensors(vars(layer)))
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) + sum(layer.nbytes for layer in reserved)

    def _check(self, inputs: torch.Tensor) -> None:
        if self.is_first:
            fits = inputs.ndim == 1 and inputs.dtype == torch.int64
        else:
            fits = inputs.ndim == 2 and inputs.shape[1] == self.hidden_size and inputs.dtype == self._dtype
        if not fits or not inputs.shape[0]:
            problem = f"a stage cannot take {inputs.dtype} of shape {list(inputs.shape)}"
            raise InputError(problem, code="bad_stage_input")


def _tensors(held: Mapping[Any, Any]) -> Iterator[torch.Tensor]:
    for value in held.values():
        if isinstance(value, Mapping):  # states of linear attention, by number
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor) and value.ndim:  # no scalars: a sliding layer keeps its window's size
            yield value
