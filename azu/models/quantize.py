"""Linear layers' weights as they are held: each is turned into integers, or prepacked, as soon as it is read.

transformers' loader takes a quantiser, and asks it at each parameter. For integers ours works through torchao and knows
what the loader's own torchao quantiser leaves out: GPT-2's transposed layers and experts that are fused to one tensor.
On a CPU it also has oneDNN prepack what stays a float (`azu.models.prepacked`). The loader reads one parameter after
another, so no stage is ever held twice.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from azu.errors import InputError
from azu.models.prepacked import LINEAR, PrepackedLinear, can_prepack, prepack
from azu.models.siblings import join_siblings
from azu.models.weight_formats import is_router
from azu.wire.tensors import ACTIVATIONS

if TYPE_CHECKING:
    from azu.wire.tensors import WeightFormat

__all__ = ["HeldWeights", "held_weights", "return_freed_memory"]

_METHOD = "azu"
_INTEGERS = frozenset({"int8", "int4"})
_FUSED_EXPERTS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_TRIM_BYTES = 32 << 20  # of weights in bfloat16; quantising leaves holes of several times their size in the heap


@register_quantization_config(_METHOD)
class HeldWeights(QuantizationConfigMixin):
    """What `from_pretrained` takes as its quantization_config: the weights' format and the device that will compute."""

    def __init__(self, wanted: WeightFormat, device: torch.device, *, packed: bool) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # registered above, as upstream's documentation has it
        self.wanted = wanted
        self.device = device
        self.prepack = device.type == "cpu" and can_prepack(getattr(torch, ACTIVATIONS[wanted]))
        self._packed = packed
        self.out_of_memory: torch.OutOfMemoryError | None = None
        self.ready = _Ready()  # what was prepacked already, by parameter
        self._freed = 0

    def take_head(self, model: Any, state: MutableMapping[str, Any]) -> None:
        """Prepack the head before all else is read: it is held twice meanwhile, and with the layers that were too much.

        The loader goes by the names' order, in which some families' layers come first.

        Args:
            model: the stage on the meta device.
            state: what the loader reads; `tensor[...]` gives a tensor, cast already.
        """
        head = model.get_output_embeddings()
        name = next((f"{path}.weight" for path, module in model.named_modules() if module is head), "")
        if name in state and self.prepacks(model, name):
            value = state[name][...]
            state[name] = _Taken(value)
            self.ready[name] = prepack(value)
            del value
            return_freed_memory()

    def prepacks(self, model: Any, param_name: str) -> bool:
        """Whether a parameter's weight is held as oneDNN's."""
        tied = model.all_tied_weights_keys  # with an embedding, which looks rows up
        if not self.prepack or param_name in {*tied, *tied.values()}:
            return False
        module_name, _dot, parameter = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if parameter != "weight" or type(module).__name__ not in LINEAR:
            return False
        # In bfloat16 all gain. Of others always the head, the largest matrix by far: it takes half the time from four
        # rows on and loses little at one.
        return self._packed or module.weight.dtype == torch.bfloat16 or module is model.get_output_embeddings()

    def note_freed(self, size: int) -> None:
        """Called once a weight of `size` bytes is held otherwise: from time to time, gives its memory back."""
        self._freed += size
        if self._freed >= _TRIM_BYTES:
            self._freed = 0
            return_freed_memory()


def held_weights(wanted: WeightFormat, device: torch.device, *, packed: bool = False) -> HeldWeights | None:
    """How a format's weights are held on a device; None where all are left as they are read.

    Args:
        packed: on a CPU, prepack layers in float32 too (see `azu.models.prepacked.layers_pay`).

    Raises:
        InputError: code "missing_package", where torchao is not installed, or of a release that lacks what is needed.
    """
    if wanted not in _INTEGERS:
        held = HeldWeights(wanted, device, packed=packed)
        return held if held.prepack else None
    try:
        importlib.import_module("azu.models.integer_weights")  # takes seconds
    except ImportError as error:
        raise InputError(
            f"--dtype {wanted} needs the package torchao ({error})",
            code="missing_package",
            remedy="Install it: pip install 'azu[integers]'",
        ) from error
    return HeldWeights(wanted, device, packed=False)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, which glibc's allocator does only for the end of its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


class _Ready(dict[str, torch.Tensor]):
    """Transformers copies a model's whole config, and oneDNN's tensors cannot be copied."""

    def __deepcopy__(self, _memo: object) -> _Ready:
        return self


class _Taken:
    """Stands in the loader's hands for a tensor that was read already: of its shape and dtype, without its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype

    def __getitem__(self, _everything: object) -> torch.Tensor:
        return torch.zeros((), dtype=self._dtype).expand(self._shape)


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    quantization_config: HeldWeights
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        full_precision = model._keep_in_fp32_modules | model._keep_in_fp32_modules_strict
        if not full_precision.isdisjoint(param_name.split(".")):
            return False
        return self._to_integers(model, param_name) or self.quantization_config.prepacks(model, param_name)

    def _to_integers(self, model: Any, param_name: str) -> bool:
        if self.quantization_config.wanted not in _INTEGERS or not param_name.startswith(model.azu_container):
            return False
        module_name, _dot, parameter = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if parameter == "weight":
            return type(module).__name__ in LINEAR | {"Conv1D"} and not is_router(module_name)
        return parameter in _FUSED_EXPERTS and getattr(module, "is_transposed", True) is False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if self.quantization_config.wanted in _INTEGERS:
            model.config._experts_implementation = "eager"  # the one that takes experts one by one

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for module in model.modules():  # not earlier: families' initialisers look at each weight
            weight = module._parameters.get("weight")
            if weight is not None and weight.is_mkldnn:
                PrepackedLinear.adopt(module)
        join_siblings(model, self.quantization_config.note_freed)

    def get_quantize_ops(self) -> ConversionOps:
        return _Convert(self)


class _Convert(ConversionOps):
    """Takes the parameter's value out of the loader's hands and puts what is to be held into the model."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self._to_integers = quantizer._to_integers
        self._config = quantizer.quantization_config

    def convert(  # type: ignore[override]  # the loader passes keywords, and takes any tensors
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, missing_keys: set[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        path, _dot, parameter = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        if value.shape != getattr(module, parameter).shape:
            raise ValueError(f"{full_layer_name} is {list(value.shape)}")
        if not self._to_integers(model, full_layer_name):
            ready = self._config.ready.pop(full_layer_name, None)
            module.weight = self._parameter(value, prepack(value) if ready is None else ready)
        elif value.ndim == 3:  # [experts, out, in]; the family's forward picks one by its index
            delattr(module, parameter)
            module.add_module(parameter, nn.ParameterList(self._integers(expert) for expert in value))
        else:
            model.set_submodule(path, self._linear(module, value))
        missing_keys.discard(full_layer_name)
        return {}

    def _linear(self, module: Any, value: torch.Tensor) -> nn.Linear:
        """The same layer around integers. Its bias is still to come, or came already."""
        weight = value.t().contiguous() if isinstance(module, Conv1D) else value
        bias = module.bias
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight, linear.bias = self._integers(weight), bias
        return linear

    def _integers(self, weight: torch.Tensor) -> nn.Parameter:
        from azu.models.integer_weights import integer_weight  # `held_weights` saw to it that torchao is there

        try:
            held = integer_weight(weight.to(self._config.device), self._config.wanted)
        except torch.OutOfMemoryError as error:
            self._config.out_of_memory = error
            raise
        return self._parameter(weight, held)

    def _parameter(self, weight: torch.Tensor, held: torch.Tensor) -> nn.Parameter:
        parameter = nn.Parameter(held, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else families' initialisers overwrite it
        self._config.note_freed(weight.nbytes)
        return parameter
