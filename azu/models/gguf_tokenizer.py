"""Rebuilds a Hugging Face tokenizer (tokenizer.json and its config) out of the vocabulary inside a GGUF file.

Byte-level BPE only. GGUF names its pre-tokeniser (`tokenizer.ggml.pre`) without describing it, so each one that
is known here is spelled out; an unknown one is refused, because a wrong split gives a model other tokens than it
was trained on, which shows only as slightly worse answers.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from azu.errors import ModelError

__all__ = ["tokenizer_files"]

_CONTROL, _USER_DEFINED = 3, 4  # of llama.cpp's token types
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(fields: dict[str, Any]) -> dict[str, bytes]:
    """Returns tokenizer.json, tokenizer_config.json and generation_config.json for a GGUF file's metadata.

    Raises:
        ModelError: code "unsupported_tokenizer", naming the tokenizer or pre-tokeniser; "bad_gguf" for a broken one.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise _unsupported(f"tokenizer {kind!r}")
    try:
        tokenizer = _build(fields)
        text = tokenizer.to_str(pretty=False).encode()
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a vocabulary that does not fit
        raise ModelError(f"GGUF tokenizer is broken ({error})", code="bad_gguf") from error
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": _dump(_tokenizer_config(fields)),
        "generation_config.json": _dump(_generation_config(fields)),
    }


def _build(fields: dict[str, Any]) -> Tokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    pre = str(fields.get("tokenizer.ggml.pre"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it stands; the others always merge.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(token, normalized=False, special=special)])
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _pre_tokenizer(name: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "gpt-2":
        return byte_level
    if name == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise _unsupported(f"pre-tokeniser {name!r}")


def _unsupported(what: str) -> ModelError:
    remedy = "Publish the model's safetensors repository instead."
    return ModelError(f"GGUF {what} is not supported", code="unsupported_tokenizer", remedy=remedy)


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
    }
    for role, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{field}_token_id")
        if index is not None:
            config[f"{role}_token"] = fields["tokenizer.ggml.tokens"][index]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    named = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: fields.get(f"tokenizer.ggml.{field}") for name, field in named.items()}
    return {name: index for name, index in ids.items() if index is not None}


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
