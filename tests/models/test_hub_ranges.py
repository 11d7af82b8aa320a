"""Files of a model, rebuilt from ranges of the repository that it was cut from, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from azu.errors import AzuError, InputError, ModelError, NetworkError, TrustError
from azu.models.hub_ranges import HubRanges
from azu.models.manifest import Blob, Manifest
from azu.models.publish import publish
from azu.models.store import LayerStore
from tests.loopback_hub import LoopbackHub, sharded_llama

REPO = "me/tiny"
CONFIG = (
    b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, '
    b'"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 128, '
    b'"max_position_embeddings": 64, "tie_word_embeddings": false, "torch_dtype": "float32"}'
)


def weights() -> dict[str, np.ndarray]:
    """Names and shapes of a Llama with two layers."""
    chance = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, 32), "model.norm.weight": (32,)}
    shapes["lm_head.weight"] = (128, 32)
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (16 if name in "kv" else 32, 32) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (32, 64)}
        shapes |= {f"{layer}{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    return {name: chance.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def repository(shards: int) -> dict[str, bytes]:
    """Its files; the tensors of a layer lie in several shards, where there are some."""
    tensors = weights()
    if shards == 1:
        return {"config.json": CONFIG, "model.safetensors": safetensors.numpy.save(tensors)}
    names = sorted(tensors)
    files = {"config.json": CONFIG}
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        files[file] = safetensors.numpy.save(part)
        places |= dict.fromkeys(part, file)
    index = ",".join(f'"{name}": "{file}"' for name, file in places.items())
    files["model.safetensors.index.json"] = f'{{"weight_map": {{{index}}}}}'.encode()
    return files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("azu.models.hub_ranges._PAUSES", (0.0, 0.0))
        yield hub


def published(
    hub: LoopbackHub, tmp_path: Path, shards: int = 1, files: dict[str, bytes] | None = None
) -> tuple[Manifest, LayerStore]:
    """A repository on the hub, and what publishing it gave."""
    files = files or repository(shards)
    commit = hub.add(REPO, files)
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    store = LayerStore(tmp_path / "publisher")
    manifest = publish(str(folder), store, model_id=REPO)
    return replace(manifest, origin=REPO, revision=commit), store


def ranges(manifest: Manifest, store: LayerStore) -> HubRanges:
    return HubRanges(manifest, store, lambda _: None)


@pytest.mark.parametrize("shards", [1, 3])
def test_every_file_comes_out_as_it_was_published(hub: LoopbackHub, tmp_path: Path, shards: int) -> None:
    manifest, publisher = published(hub, tmp_path, shards)
    store = LayerStore(tmp_path / "worker")
    source = ranges(manifest, store)
    hub.encoding = "gzip"  # what a few bytes would unpack to knows no bound: they count as they come
    for blob in manifest.blobs():
        source.fetch(blob)
        assert store.path(blob.digest).read_bytes() == publisher.path(blob.digest).read_bytes()


def test_only_the_ranges_of_a_layer_are_fetched(hub: LoopbackHub, tmp_path: Path) -> None:
    manifest, _ = published(hub, tmp_path)
    layer = manifest.layers[1]
    ranges(manifest, LayerStore(tmp_path / "worker")).fetch(layer)
    whole = len(repository(1)["model.safetensors"])
    assert layer.size / 2 < hub.sent("model.safetensors") < whole * 0.6
    assert len(hub.of("model.safetensors")) <= 4, "tensors that follow one another come in one request"


def test_a_transfer_that_breaks_is_taken_up_again(hub: LoopbackHub, tmp_path: Path) -> None:
    manifest, _ = published(hub, tmp_path)
    store = LayerStore(tmp_path / "worker")
    source = ranges(manifest, store)
    source.fetch(manifest.layers[0])
    hub.cut_after["model.safetensors"] = 5_000
    source.fetch(manifest.layers[1])
    assert not hub.cut_after
    assert store.verify(manifest.layers[1].digest)


def refused(manifest: Manifest, tmp_path: Path, blob: Blob, kind: type[AzuError]) -> str:
    """The code of the error; nothing may be stored."""
    store = LayerStore(tmp_path / "worker")
    with pytest.raises(kind) as raised:
        ranges(manifest, store).fetch(blob)
    assert store.digests() == set()
    assert not list((store.root / "partial").iterdir())
    return raised.value.code


def test_other_bytes_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    manifest, _ = published(hub, tmp_path)
    files = hub.repos[REPO].commits[manifest.revision]
    header = int.from_bytes(files["model.safetensors"][:8], "little") + 8
    files["model.safetensors"] = files["model.safetensors"][:header] + bytes(len(files["model.safetensors"]) - header)
    files["config.json"] = CONFIG.replace(b"128", b"129")
    for blob in (*manifest.layers, manifest.config):
        assert refused(manifest, tmp_path, blob, TrustError) == "digest_mismatch"


@pytest.mark.parametrize("header", [b"\xff" * 8, (10**9).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}", b""])
def test_hostile_headers_are_refused_before_they_are_fetched(hub: LoopbackHub, tmp_path: Path, header: bytes) -> None:
    manifest, _ = published(hub, tmp_path)
    hub.repos[REPO].commits[manifest.revision]["model.safetensors"] = header + bytes(100)
    refused(manifest, tmp_path, manifest.layers[0], ModelError)
    assert hub.sent("model.safetensors") < 200


def test_an_index_that_was_not_published_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    manifest, _ = published(hub, tmp_path, shards=2)
    name = "model.safetensors.index.json"
    files = hub.repos[REPO].commits[manifest.revision]
    files[name] = files[name].replace(b"00001-of", b"00002-of")
    assert refused(manifest, tmp_path, manifest.layers[0], TrustError) == "digest_mismatch"


def test_a_repository_that_is_gone_or_closed_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    manifest, _ = published(hub, tmp_path)
    hub.repos[REPO].gated = True
    assert refused(manifest, tmp_path, manifest.layers[0], InputError) == "gated_model"
    hub.repos.clear()
    assert refused(manifest, tmp_path, manifest.layers[0], InputError) == "unknown_model"
    hub.status = 500
    assert refused(manifest, tmp_path, manifest.layers[0], NetworkError) == "hub_unreachable"


def test_the_owners_token_opens_no_repository_that_a_publisher_names(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    manifest, _ = published(hub, tmp_path)
    hub.repos[REPO].gated, hub.repos[REPO].tokens = True, frozenset({"hf_secret"})
    assert refused(manifest, tmp_path, manifest.config, InputError) == "gated_model"
    while not hub.asked:  # it notes a request once its answer is out
        time.sleep(0.01)
    assert not any(asked.authorized for asked in hub.asked)


def test_a_file_of_another_model(hub: LoopbackHub, tmp_path: Path) -> None:
    manifest, _ = published(hub, tmp_path)
    assert refused(manifest, tmp_path, Blob("0" * 64, 5), ModelError) == "missing_blob"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_large_file_comes_with_its_piece_list_and_goes_on_where_a_transfer_ended(
    hub: LoopbackHub, tmp_path: Path, is_damaged: bool
) -> None:
    """Of a piece list the hub knows nothing: it comes out of the file that it belongs to."""
    manifest, publisher = published(hub, tmp_path, files=sharded_llama(n_layers=1, hidden=512, shards=2))
    (layer,) = manifest.layers
    assert layer.piece_list is not None
    store = LayerStore(tmp_path / "worker")

    def stop(came: int) -> None:
        if came > layer.size - 500_000:
            raise NetworkError("stopped", code="cancelled")

    with pytest.raises(NetworkError, match="stopped"):
        HubRanges(manifest, store, stop).fetch(layer)
    (left,) = (store.root / "partial").iterdir()
    before = sum(asked.sent for asked in hub.asked)
    if is_damaged:
        left.write_bytes(bytes(left.stat().st_size))
        with pytest.raises(TrustError):
            ranges(manifest, store).fetch(layer)
        assert store.digests() == set()
        ranges(manifest, store).fetch(layer)
    else:
        assert ranges(manifest, store).fetch(layer.piece_list) == layer
        assert sum(asked.sent for asked in hub.asked) - before < 1_000_000
    for digest in (layer.digest, layer.pieces):
        assert store.path(digest).read_bytes() == publisher.path(digest).read_bytes()
    assert not list((store.root / "partial").iterdir())
