"""Publishing cuts a source into blobs that hold the same tensors, twice the same, and refuses what it cannot cut."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file

from azu.errors import AzuError, InputError, ModelError, NetworkError, TrustError
from azu.models import hub
from azu.models.manifest import Manifest
from azu.models.publish import publish
from azu.models.store import LayerStore

SaveTiny = Callable[..., Path]


def tensors_of(paths: list[Path]) -> dict[str, Any]:
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def refused(source: Path | str, store: LayerStore) -> str:
    with pytest.raises(AzuError) as caught:
        publish(str(source), store)
    assert caught.value.message
    return caught.value.code


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_published(save_tiny: SaveTiny, store: LayerStore, shard_size: str, tied: bool) -> None:
    source = save_tiny(max_shard_size=shard_size, tie_word_embeddings=tied)
    shards = list(source.glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_size == "20KB")
    steps: list[tuple[str, int, int]] = []
    manifest = publish(str(source), store, model_id="me/tiny", progress=lambda *step: steps.append(step))
    blobs = [*manifest.layers, *manifest.shared.values()]
    assert same(tensors_of([store.path(blob.digest) for blob in blobs]), tensors_of(shards))
    for index, blob in enumerate(manifest.layers):
        assert all(name.startswith(f"model.layers.{index}.") for name in load_file(store.path(blob.digest)))
    assert manifest.tied is tied
    assert ("lm_head.weight" in manifest.shared) is not tied
    assert (manifest.n_layers, manifest.hidden_size, manifest.vocab_size) == (4, 32, 64)
    assert (manifest.model_id, manifest.architecture, manifest.dtype) == ("me/tiny", "LlamaForCausalLM", "float32")
    assert [cache.per_token for cache in manifest.caches] == [2 * 2 * 8] * 4
    assert manifest.context_length == 64
    assert store.path(manifest.config.digest).read_bytes() == (source / "config.json").read_bytes()
    assert list(manifest.tokenizer) == ["generation_config.json"]
    assert [step[1] for step in steps] == list(range(1, len(blobs) + 1))
    assert {step[2] for step in steps} == {len(blobs)}


def test_shards_do_not_change_the_layers(save_tiny: SaveTiny, store: LayerStore, tmp_path: Path) -> None:
    whole = publish(str(save_tiny()), store)
    shutil.rmtree(tmp_path / "tiny-llama")
    sharded = publish(str(save_tiny(max_shard_size="20KB")), store)
    assert sharded.layers == whole.layers
    assert sharded.shared == whole.shared
    assert sharded.digest != whole.digest  # other source files


def test_publishing_again_rewrites_nothing(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    first = publish(str(source), store)
    before = {digest: store.path(digest).stat().st_ino for digest in store.digests()}
    steps: list[object] = []
    assert publish(str(source), store, progress=lambda *step: steps.append(step)) == first
    assert {digest: store.path(digest).stat().st_ino for digest in store.digests()} == before
    assert steps == []
    assert Manifest.from_bytes(store.path(first.digest).read_bytes()) == first


def test_a_lost_blob_or_a_broken_index_is_made_good(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    first = publish(str(source), store)
    store.path(first.layers[2].digest).unlink()
    assert publish(str(source), store) == first
    assert store.verify(first.layers[2].digest)
    (store.root / "published.json").write_text("{")
    assert publish(str(source), store) == first


def test_names_without_the_base_prefix(save_tiny: SaveTiny, store: LayerStore) -> None:
    """As the hub's GPT-2 has them, with the causal masks that old checkpoints carry along."""
    import torch
    from safetensors.torch import save_file

    source = save_tiny("GPT2Config", n_embd=32, n_layer=4, n_head=4, n_positions=64)
    tensors = load_file(source / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    renamed |= {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for index in range(4)}
    save_file(renamed, source / "model.safetensors")
    manifest = publish(str(source), store)
    assert sorted(manifest.shared) == ["ln_f.bias", "ln_f.weight", "wpe.weight", "wte.weight"]
    assert (manifest.dtype, manifest.tied, manifest.context_length) == ("float32", True, 64)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_refused(tmp_path: Path, store: LayerStore, suffix: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"pytorch_model.{suffix}").write_bytes(b"\x80\x04")
    assert refused(tmp_path, store) == "unsafe_weights"
    assert refused(tmp_path / f"pytorch_model.{suffix}", store) == "unsafe_weights"
    assert store.digests() == set()


def test_pickles_beside_safetensors_are_left_alone(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pytorch_model.bin" not in publish(str(source), store).sources


def test_what_is_no_model(tmp_path: Path, store: LayerStore, save_tiny: SaveTiny) -> None:
    assert refused(tmp_path / "absent", store) == "bad_source"
    assert refused("./absent.gguf", store) == "bad_source"
    assert refused("no hub id!", store) == "bad_source"
    (tmp_path / "x.txt").write_text("")
    assert refused(tmp_path / "x.txt", store) == "bad_source"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", store) == "no_config"
    (tmp_path / "empty/config.json").write_text("{}")
    assert refused(tmp_path / "empty", store) == "no_weights"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    assert refused(tmp_path / "broken.gguf", store) == "bad_gguf"
    assert store.digests() == set()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"architectures": None}, "bad_config"),
        ({"hidden_size": "32"}, "bad_config"),
        ({"vocab_size": -1}, "bad_config"),
        ({"num_hidden_layers": 5}, "unknown_layout"),
        ({"num_hidden_layers": 10**12}, "bad_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unsupported_quantization"),
    ],
)
def test_configs_that_do_not_fit(save_tiny: SaveTiny, store: LayerStore, changes: dict[str, Any], code: str) -> None:
    source = save_tiny()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    assert refused(source, store) == code


def test_config_that_is_no_json(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    for text in ("[" * 100_000, "[]", "{"):
        (source / "config.json").write_text(text)
        assert refused(source, store) == "bad_json"


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7, "..safetensors"]
)
def test_index_paths_stay_inside(save_tiny: SaveTiny, store: LayerStore, shard: object) -> None:
    source = save_tiny()
    index = {"weight_map": {"model.norm.weight": shard}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(source, store) == "bad_index"


def test_index_that_does_not_match_its_shards(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"ghost": "model.safetensors"}}))
    assert refused(source, store) == "bad_index"
    index.write_text(json.dumps({"weight_map": {"ghost": "absent.safetensors"}}))
    assert refused(source, store) == "unreadable_source"
    index.write_text("{}")
    assert refused(source, store) == "bad_index"


def test_truncated_weights(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert refused(source, store) == "bad_safetensors"


def test_quantised_dtypes(save_tiny: SaveTiny, store: LayerStore) -> None:
    import torch
    from safetensors.torch import save_file

    source = save_tiny()
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, source / "model.safetensors")
    assert refused(source, store) == "unsupported_dtype"


def test_publishing_imports_no_torch() -> None:
    code = (
        "import sys, azu.models.publish, azu.models.hub, azu.models.gguf_source, azu.models.memory; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())


# --- the hub ---


@pytest.fixture
def snapshot(save_tiny: SaveTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub snapshot as huggingface_hub leaves it: links into a folder of blobs named by their SHA-256."""
    import hashlib

    source = save_tiny()
    place = tmp_path / "models--me--tiny" / "snapshots" / ("c" * 40)
    place.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for path in source.iterdir():
        blob = tmp_path / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (place / path.name).symlink_to(blob)
    asked: dict[str, Any] = {}

    def download(repo: str, **how: Any) -> str:
        asked.update(how, repo=repo)
        return str(place)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "asked", asked, raising=False)
    return place


def test_a_hub_model(snapshot: Path, store: LayerStore) -> None:
    manifest = publish("me/tiny@v1.0", store)
    assert (manifest.model_id, manifest.revision) == ("me/tiny", "c" * 40)
    asked = hub.asked  # type: ignore[attr-defined]  # put there by the fixture
    assert (asked["repo"], asked["revision"]) == ("me/tiny", "v1.0")
    assert not any(
        pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"] if "chat" not in pattern
    )


def test_a_file_that_is_not_what_the_hub_announced(snapshot: Path, store: LayerStore) -> None:
    config = (snapshot / "config.json").resolve()
    config.write_text(config.read_text() + " ")
    with pytest.raises(TrustError) as caught:
        publish("me/tiny", store)
    assert caught.value.code == "digest_mismatch"
    assert store.digests() == set()


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://127.0.0.1/"))


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (GatedRepoError("x", response=response(403)), InputError, "gated_model"),
        (RepositoryNotFoundError("x", response=response(404)), InputError, "unknown_model"),
        (RevisionNotFoundError("x", response=response(404)), InputError, "unknown_revision"),
        (LocalEntryNotFoundError("x"), NetworkError, "hub_unreachable"),
        (httpx2.ConnectError("x"), NetworkError, "hub_unreachable"),
        (OSError(28, "No space left on device"), AzuError, "storage"),
    ],
)
def test_hub_errors(
    monkeypatch: pytest.MonkeyPatch, store: LayerStore, error: Exception, kind: type[AzuError], code: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(kind) as caught:
        publish("me/tiny", store)
    assert caught.value.code == code
    assert code == "unknown_revision" or caught.value.remedy


def test_model_errors_name_a_remedy() -> None:
    assert str(ModelError("x", remedy="Do y.")) == "x. Do y."
