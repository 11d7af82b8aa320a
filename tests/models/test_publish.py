"""Publishing cuts a source into blobs that hold the same tensors, twice the same, and refuses what it cannot cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from azu.errors import AzuError, InputError, ModelError
from azu.models.manifest import Blob, Manifest
from azu.models.progress import Progress
from azu.models.publish import publish
from azu.models.store import LayerStore

SaveTiny = Callable[..., Path]


class CountingStore(LayerStore):
    """A store that knows what it was given."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[str] = []

    def put_chunks(self, chunks: Iterable[bytes | memoryview]) -> Blob:
        blob = super().put_chunks(chunks)
        self.written.append(blob.digest)
        return blob


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
    steps: list[Progress] = []
    manifest = publish(str(source), store, model_id="me/tiny", report=steps.append)
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
    assert [step.done for step in steps] == list(range(len(blobs) + 1))
    assert {(step.stage, step.total) for step in steps} == {("cutting", len(blobs))}


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
    steps: list[Progress] = []
    assert publish(str(source), store, report=steps.append) == first
    assert {digest: store.path(digest).stat().st_ino for digest in store.digests()} == before
    assert steps == []
    assert Manifest.from_bytes(store.path(first.digest).read_bytes()) == first


def test_a_lost_blob_or_a_broken_index_is_made_good(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    first = publish(str(source), store)
    store.path(first.layers[2].digest).unlink()
    assert publish(str(source), store) == first
    assert store.verify(first.layers[2].digest)
    config = store.path(first.config.digest)
    config.chmod(0o600)
    config.write_bytes(bytes(config.stat().st_size))  # as a power loss may leave it
    assert publish(str(source), store) == first
    assert store.verify(first.config.digest)
    (record,) = (store.root / "published").iterdir()
    for damage in (b"", b"\xff", b"0" * 64, first.layers[0].digest.encode()):
        record.write_bytes(damage)
        assert publish(str(source), store) == first


def test_an_interrupted_cut_goes_on_where_it_was(save_tiny: SaveTiny, store: LayerStore, tmp_path: Path) -> None:
    source = save_tiny()
    undisturbed = publish(str(source), LayerStore(tmp_path / "other"))

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(str(source), store, report=stop)
    assert store.digests() == {blob.digest for blob in undisturbed.layers[:3]}
    (journal,) = (store.root / "cutting").iterdir()
    # What a crash or a bad disk may leave there: torn lines, lies about blobs that are not here, other JSON.
    text = journal.read_text()
    lie = json.dumps(["layer 3", "f" * 64, 100, ""])
    journal.write_text(f'{text}\n["layer 4", "abc\n{lie}\n[]\n{{"a": 1}}\nnull\n["layer 0", 7, "x", null]\n')
    store.path(undisturbed.layers[1].digest).unlink()
    torn = store.path(undisturbed.layers[2].digest)
    torn.chmod(0o600)
    torn.write_bytes(bytes(torn.stat().st_size))
    counting = CountingStore(store.root)
    assert publish(str(source), counting) == undisturbed
    assert [blob.digest in counting.written for blob in undisturbed.layers] == [False, True, True, True]
    assert list((store.root / "cutting").iterdir()) == []


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
        ({"architectures": ["T5ForConditionalGeneration"]}, "unsupported_architecture"),
        ({"architectures": ["BertForMaskedLM"]}, "unsupported_architecture"),
        ({"is_encoder_decoder": True}, "unsupported_architecture"),
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
    for text in ("[" * 100_000, "[]", "{", f"{source.joinpath('config.json').read_text()}{' ' * (1 << 20)}"):
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


def add_tensors(folder: Path, names: Iterable[str]) -> None:
    import torch
    from safetensors.torch import save_file

    extra = {name: torch.ones(1) for name in names}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")


@pytest.mark.parametrize("names", [["[/dim]"], ["\x1b[2J"], [f"x{number}" for number in range(1100)]])
def test_what_no_manifest_can_say_is_refused_before_it_is_cut(
    save_tiny: SaveTiny, store: LayerStore, names: list[str]
) -> None:
    source = save_tiny()
    add_tensors(source, names)
    assert refused(source, store) == "unpublishable"
    assert store.digests() == set()
    assert not (store.root / "cutting").exists()


def test_any_folder_name_will_do(save_tiny: SaveTiny, store: LayerStore, tmp_path: Path) -> None:
    folder = save_tiny().rename(tmp_path / "..My model (1)...final")
    assert publish(str(folder), store).model_id == "My-model-1-final"
    assert publish(str(folder.rename(tmp_path / "(2)")), store).model_id == "2"
    assert publish(str((tmp_path / "(2)").rename(tmp_path / "模型")), store).model_id == "model"


def test_a_source_that_changes_while_it_is_cut(save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny()
    weights = source / "model.safetensors"
    before = weights.read_bytes()

    def overwrite(progress: Progress) -> None:
        if progress.done == 2:
            weights.write_bytes(before[:-4000] + bytes(4000))

    with pytest.raises(InputError) as caught:
        publish(str(source), store, report=overwrite)
    assert caught.value.code == "source_changed"
    weights.write_bytes(before)  # nothing that was cut meanwhile passes for the first one's
    again = publish(str(source), store)
    blobs = [*again.layers, *again.shared.values()]
    assert same(tensors_of([store.path(blob.digest) for blob in blobs]), tensors_of([weights]))


def test_a_source_that_gets_shorter_while_it_is_cut(save_tiny: SaveTiny, store: LayerStore) -> None:
    """Were it mapped, the process would end here."""
    weights = save_tiny() / "model.safetensors"

    def shorten(progress: Progress) -> None:
        if progress.done == 2:
            os.truncate(weights, 4096)

    with pytest.raises(InputError, match="was changed") as caught:
        publish(str(weights.parent), store, report=shorten)
    assert caught.value.code == "source_changed"


def test_links_out_of_a_folder(save_tiny: SaveTiny, store: LayerStore, tmp_path: Path) -> None:
    """A cloned repository may link to anything of the operator's, and what is published everybody gets."""
    source = save_tiny()
    (tmp_path / "secret").write_text("{}")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    assert refused(source, store) == "unsafe_link"
    (source / "tokenizer_config.json").unlink()
    config = (source / "config.json").rename(source / "other.json")
    (source / "config.json").symlink_to(config.name)
    (source / "model.safetensors").rename(tmp_path / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "weights")
    assert publish(str(source), store).n_layers == 4
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/dev/zero")
    assert refused(source, store) == "unsafe_link"


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


def test_model_errors_name_a_remedy() -> None:
    assert str(ModelError("x", remedy="Do y.")) == "x. Do y."
