"""Integer weights at load: each linear layer is turned into integers as soon as it is read.

transformers' loader takes a quantiser, and asks it at each parameter. Ours works through torchao and knows what the
loader's own torchao quantiser leaves out: GPT-2's transposed layers and experts that are fused to one tensor.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from azu.errors import InputError
from azu.models.weight_formats import is_router

if TYPE_CHECKING:
    from azu.wire.tensors import WeightFormat

__all__ = ["IntegerWeights", "integer_weights", "return_freed_memory"]

_METHOD = "azu"
# Subclasses of nn.Linear do more than multiply (Llama 4's router), but for this one.
_LINEAR = frozenset({"Linear", "FalconLinear", "Conv1D"})
_FUSED_EXPERTS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
_TRIM_BYTES = 32 << 20  # of weights in bfloat16; quantising leaves holes of several times their size in the heap


@register_quantization_config(_METHOD)
class IntegerWeights(QuantizationConfigMixin):
    """What `from_pretrained` takes as its quantization_config: the weights' format and the device that will compute."""

    def __init__(self, wanted: WeightFormat, device: torch.device) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]  # registered above, as upstream's documentation has it
        self.wanted = wanted
        self.device = device
        self.out_of_memory: torch.OutOfMemoryError | None = None
        self._freed = 0

    def note_freed(self, size: int) -> None:
        """Called once a weight of `size` bytes is an integer: from time to time, gives its memory back."""
        self._freed += size
        if self._freed >= _TRIM_BYTES:
            self._freed = 0
            return_freed_memory()


def integer_weights(wanted: WeightFormat, device: torch.device) -> IntegerWeights | None:
    """The quantisation of a format; None for a float format.

    Raises:
        InputError: code "missing_package", where torchao is not installed, or of a release that lacks what is needed.
    """
    if wanted not in ("int8", "int4"):
        return None
    try:
        importlib.import_module("azu.models.integer_weights")  # takes seconds
    except ImportError as error:
        raise InputError(
            f"--dtype {wanted} needs the package torchao ({error})",
            code="missing_package",
            remedy="Install it: pip install 'azu[integers]'",
        ) from error
    return IntegerWeights(wanted, device)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, which glibc's allocator does only for the end of its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    quantization_config: IntegerWeights
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module_name, _dot, parameter = param_name.rpartition(".")
        full_precision = model._keep_in_fp32_modules | model._keep_in_fp32_modules_strict
        if not param_name.startswith(model.azu_container) or not full_precision.isdisjoint(param_name.split(".")):
            return False
        module = model.get_submodule(module_name)
        if parameter == "weight":
            return type(module).__name__ in _LINEAR and not is_router(module_name)
        return parameter in _FUSED_EXPERTS and getattr(module, "is_transposed", True) is False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        model.config._experts_implementation = "eager"  # the one that takes experts one by one

    def get_quantize_ops(self) -> ConversionOps:
        return _ToIntegers(self.quantization_config)


class _ToIntegers(ConversionOps):
    """Takes the parameter's value out of the loader's hands and puts integers into the model."""

    def __init__(self, config: IntegerWeights) -> None:
        self._config = config

    def convert(  # type: ignore[override]  # the loader passes keywords, and takes any tensors
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, missing_keys: set[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        path, _dot, parameter = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        if value.shape != getattr(module, parameter).shape:
            raise ValueError(f"{full_layer_name} is {list(value.shape)}")
        if value.ndim == 3:  # [experts, out, in]; the family's forward picks one by its index
            delattr(module, parameter)
            module.add_module(parameter, nn.ParameterList(self._parameter(expert) for expert in value))
        else:
            model.set_submodule(path, self._linear(module, value))
        missing_keys.discard(full_layer_name)
        return {}

    def _linear(self, module: Any, value: torch.Tensor) -> nn.Linear:
        """The same layer around integers. Its bias is still to come, or came already."""
        weight = value.t().contiguous() if isinstance(module, Conv1D) else value
        bias = module.bias
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight, linear.bias = self._parameter(weight), bias
        return linear

    def _parameter(self, weight: torch.Tensor) -> nn.Parameter:
        from azu.models.integer_weights import integer_weight  # `integer_weights` saw to it that torchao is there

        try:
            held = integer_weight(weight.to(self._config.device), self._config.wanted)
        except torch.OutOfMemoryError as error:
            self._config.out_of_memory = error
            raise
        parameter = nn.Parameter(held, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else families' initialisers overwrite it
        self._config.note_freed(weight.nbytes)
        return parameter
