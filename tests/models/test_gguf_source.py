"""The GGUF import of SmolLM2 gives transformers' own weights, a tokenizer that splits digits, and an HF config."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from azu.errors import InputError, ModelError
from azu.models.gguf_source import open_gguf
from azu.models.gguf_tokenizer import tokenizer_files
from azu.models.publish import publish
from tests.models.conftest import Published


@pytest.fixture(scope="module")
def tokenizer(smollm2: Published) -> Tokenizer:
    digest = smollm2.manifest.tokenizer["tokenizer.json"].digest
    return Tokenizer.from_file(str(smollm2.store.path(digest)))


def json_of(published: Published, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(published.store.path(published.manifest.tokenizer[name].digest).read_bytes())
    return value


def test_the_manifest(smollm2: Published) -> None:
    manifest = smollm2.manifest
    assert manifest.model_id == "SmolLM2-135M-Instruct"
    assert (manifest.n_layers, manifest.hidden_size, manifest.vocab_size) == (30, 576, 49152)
    assert (manifest.context_length, manifest.dtype, manifest.tied) == (8192, "float32", True)
    assert [cache.per_token for cache in manifest.caches] == [2 * 3 * 64] * 30
    assert sorted(manifest.shared) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert sorted(manifest.tokenizer) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_the_config(smollm2: Published) -> None:
    from transformers import LlamaConfig

    config: Any = LlamaConfig(**smollm2.config)
    assert config.rope_parameters["rope_theta"] == 100_000.0
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.eos_token_id) == (1e-05, True, 2)


def test_weights_equal_transformers_own(smollm2: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig, modeling_utils

    # It asks for accelerate with any GGUF file, but to de-quantise one on the CPU it does not use it.
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: True)
    reference = AutoModelForCausalLM.from_pretrained(
        str(smollm2.source.parent),
        gguf_file=smollm2.source.name,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    for index in (0, 17, 29):
        for name, tensor in load_file(smollm2.store.path(smollm2.manifest.layers[index].digest)).items():
            assert tensor.equal(reference[name]), name
    for name, blob in smollm2.manifest.shared.items():
        assert load_file(smollm2.store.path(blob.digest))[name].equal(reference[name]), name


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces\n\n\tand tabs ",
        "naïve café 東京 🙂",
        "x = 3.14159 * 2024",
        "I'll don't WE'RE",
        "",
    ],
)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("1234567890").tokens == list("1234567890")


def test_special_tokens(tokenizer: Tokenizer, smollm2: Published) -> None:
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids[0] == 1
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    config = json_of(smollm2, "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert "<|im_start|>assistant" in config["chat_template"]
    assert json_of(smollm2, "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_publishing_again_is_the_same(smollm2: Published) -> None:
    assert publish(str(smollm2.source), smollm2.store) == smollm2.manifest


# --- what it refuses ---


def write_gguf(path: Path, architecture: str = "llama", tensors: tuple[str, ...] = (), **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {"block_count": 1, "embedding_length": 4, "attention.head_count": 1, **more}.items():
        key = f"{architecture}.{name}"
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name in ("token_embd.weight", *tensors):
        writer.add_tensor(name, np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught, open_gguf(path):
        pass
    return caught.value


def test_other_architectures_are_named(tmp_path: Path) -> None:
    error = refusal(write_gguf(tmp_path / "x.gguf", "qwen2"))
    assert error.code == "unsupported_architecture"
    assert "qwen2" in error.message
    assert "experts" in refusal(write_gguf(tmp_path / "y.gguf", expert_count=8)).message
    assert "blk.0.odd.weight" in refusal(write_gguf(tmp_path / "z.gguf", tensors=("blk.0.odd.weight",))).message


def test_rope_scaling(tmp_path: Path) -> None:
    more: dict[str, Any] = {"rope.scaling.type": "yarn"}
    scaled = write_gguf(tmp_path / "x.gguf", **more)
    assert refusal(scaled).code == "unsupported_rope"
    assert refusal(write_gguf(tmp_path / "y.gguf", tensors=("rope_freqs.weight",))).code == "unsupported_rope"


def test_damage(tmp_path: Path, smollm2_gguf: Path) -> None:
    with smollm2_gguf.open("rb") as file:
        whole = file.read(3_000_000)
    for length in (0, 3, 20, 1000, 100_000, 3_000_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert refusal(tmp_path / "cut.gguf").code == "bad_gguf"
    assert refusal(write_gguf(tmp_path / "bare.gguf")).code == "bad_gguf"  # lacks most of its metadata


def test_a_file_that_gets_shorter_while_it_is_read(tmp_path: Path, smollm2_gguf: Path) -> None:
    path = tmp_path / "x.gguf"
    shutil.copyfile(smollm2_gguf, path)
    with open_gguf(path) as source:
        os.truncate(path, 1000)
        with pytest.raises(InputError, match="was changed") as caught:
            next(iter(source.read("model.layers.29.mlp.up_proj.weight")))
    assert caught.value.code == "source_changed"


def vocabulary(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["<s>", "a", "b", "ab", "1"],
        "merges": ["a b"],
    }
    fields |= {"token_type": [3, 1, 1, 1, 1], "bos_token_id": 0, "eos_token_id": 0}
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | changes).items()}


@pytest.mark.parametrize("changes", [{"pre": "viking"}, {"model": "llama"}, {"model": None}, {"pre": None}])
def test_unknown_tokenizers_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        tokenizer_files(vocabulary(**changes))
    assert caught.value.code == "unsupported_tokenizer"
    assert str(next(iter(changes.values()))) in caught.value.message


@pytest.mark.parametrize("changes", [{"merges": ["a z"]}, {"merges": ["ab"]}, {"token_type": [3]}, {"tokens": [1, 2]}])
def test_broken_vocabularies(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        tokenizer_files(vocabulary(**changes))
    assert caught.value.code == "bad_gguf"


def test_other_pre_tokenisers_and_bos() -> None:
    for pre in ("gpt-2", "llama-bpe"):
        files = tokenizer_files(vocabulary(pre=pre, add_bos_token=True))
        assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("ab").ids == [0, 3]
