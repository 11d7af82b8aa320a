"""Imports a GGUF file: weights de-quantised to float32, names, config and tokenizer as the HF hub would have them.

Only the Llama architecture so far. llama.cpp interleaves the rotary halves of each head of q and k; transformers
keeps them apart, so those rows are put back. De-quantised weights are exactly llama.cpp's values in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from azu.errors import ModelError
from azu.models.gguf_reader import BoundedReader
from azu.models.gguf_tokenizer import tokenizer_files
from azu.models.safetensors_file import TensorSpec
from azu.models.source import ModelSource, hash_file, local_id, revision_of, watch
from azu.models.source_errors import source_changed, unreadable_source

__all__ = ["open_gguf"]

Fields = dict[str, Any]

_QUANTISATION = re.compile(r"[._-](I?Q\d\w*|TQ\d\w*|B?F16|FP?16|FP?32)$", re.IGNORECASE)
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# What a damaged file makes of its reader, which has no error class of its own, and of numbers that are none.
_READ_ERRORS = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, OSError, MemoryError)


@contextmanager
def open_gguf(path: Path) -> Iterator[ModelSource]:
    """Opens a GGUF file as a source of float32 tensors, de-quantised one at a time as they are read.

    Raises:
        ModelError: code "bad_gguf" for a damaged file, "unsupported_architecture", "unsupported_tokenizer" or
            "unsupported_rope" for what this import does not cover, each naming it.
    """
    try:
        source = _read(path)
    except _READ_ERRORS as error:
        problem = f"{path.name} is not a readable GGUF file ({error})"
        raise ModelError(problem, code="bad_gguf", remedy="Fetch or convert it again.") from error
    yield source


def _read(path: Path) -> ModelSource:
    reader = BoundedReader(path)
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    _check_supported(fields, reader)
    by_name = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    heads = (int(_field(fields, "llama.attention.head_count")), _kv_heads(fields))
    if min(heads) < 1:
        raise ValueError("it has no attention heads")
    confirm = watch([path])
    sources = {path.name: hash_file(path)}
    tensors = {name: TensorSpec(name, "F32", _shape(tensor)) for name, tensor in by_name.items()}
    return ModelSource(
        model_id=_model_id(path, fields),
        revision=revision_of(sources),
        config=_dump(_config(fields, tied="lm_head.weight" not in by_name)),
        files=tokenizer_files(fields),
        sources=sources,
        tensors=tensors,
        read=_tensor_reader(path, by_name, tensors, heads),
        confirm=confirm,
    )


def _check_supported(fields: Fields, reader: gguf.GGUFReader) -> None:
    architecture = str(fields.get("general.architecture"))[:80]
    if architecture != "llama" or fields.get("llama.expert_count"):
        kind = architecture if architecture != "llama" else "llama with experts"
        remedy = "Publish the model's safetensors repository instead."
        raise ModelError(f"GGUF architecture {kind} is not supported", code="unsupported_architecture", remedy=remedy)
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        remedy = "Publish the model's safetensors repository instead."
        raise ModelError(f"GGUF with rope scaling ({scaling}) is not supported", code="unsupported_rope", remedy=remedy)


def _hf_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _PER_LAYER:
        raise ModelError(
            f"GGUF tensor {name[:80]!r} is not one of the Llama architecture", code="unsupported_architecture"
        )
    return f"model.layers.{match[1]}.{_PER_LAYER[match[2]]}.{match[3]}"


def _tensor_reader(
    path: Path, by_name: dict[str, gguf.ReaderTensor], specs: dict[str, TensorSpec], heads: tuple[int, int]
) -> Callable[[str], Iterator[memoryview]]:
    rows_by_suffix = {"self_attn.q_proj": heads[0], "self_attn.k_proj": heads[1]}

    def read(name: str) -> Iterator[memoryview]:
        tensor = by_name[name]
        stored = _read_stored(path, tensor)
        try:
            values = gguf.quants.dequantize(stored, tensor.tensor_type).reshape(specs[name].shape)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"GGUF tensor {tensor.name}: {error}", code="bad_gguf") from error
        n_heads = next((count for part, count in rows_by_suffix.items() if part in name), None)
        if n_heads is not None:
            values = _unpermute(values, n_heads)
        yield np.ascontiguousarray(values, dtype="<f4").data

    return read


def _read_stored(path: Path, tensor: gguf.ReaderTensor) -> npt.NDArray[Any]:
    """A tensor as it is in the file; not from gguf's mapping of it, which ends the process if the file got shorter."""
    mapped = tensor.data
    try:
        stored = np.fromfile(path, mapped.dtype, mapped.size, offset=tensor.data_offset)
    except OSError as error:
        raise unreadable_source(path, error) from error
    if stored.size != mapped.size:
        raise source_changed(path)
    return stored.reshape(mapped.shape)


def _unpermute(values: npt.NDArray[np.float32], n_heads: int) -> npt.NDArray[np.float32]:
    """Rows [heads, head_dim/2, 2, ...] as llama.cpp interleaves them, back to [heads, 2, head_dim/2, ...]."""
    if values.shape[0] % (2 * n_heads):
        raise ModelError(f"{values.shape[0]} rows do not divide by {n_heads} heads", code="bad_gguf")
    split = values.reshape(n_heads, values.shape[0] // n_heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))  # GGUF counts the fastest dimension first


def _config(fields: Fields, *, tied: bool) -> dict[str, Any]:
    hidden, heads = _field(fields, "llama.embedding_length"), _field(fields, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _field(fields, "llama.feed_forward_length"),
        "num_hidden_layers": _field(fields, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(fields),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": _field(fields, "llama.context_length"),
        "rms_norm_eps": _short(_field(fields, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(fields.get("llama.rope.freq_base", 10_000.0)),
        "vocab_size": fields.get("llama.vocab_size", len(_field(fields, "tokenizer.ggml.tokens"))),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _kv_heads(fields: Fields) -> int:
    return int(fields.get("llama.attention.head_count_kv", _field(fields, "llama.attention.head_count")))


def _field(fields: Fields, name: str) -> Any:
    try:
        return fields[name]
    except KeyError:
        raise ModelError(f"GGUF file lacks {name}", code="bad_gguf") from None


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _model_id(path: Path, fields: Fields) -> str:
    return local_id(_QUANTISATION.sub("", path.stem) or str(fields.get("general.name", "")))
