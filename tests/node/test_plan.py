"""`azu-node plan`: every source gives the figures that publishing gives, and what is said to fit fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from azu.distribution import Library
from azu.errors import InputError, ModelError
from azu.identity import Identity
from azu.models.manifest import Manifest
from azu.models.memory import stage_memory
from azu.models.publish import publish
from azu.wire.tensors import WEIGHT_FORMATS
from node.plan import describe, make_plan, show
from tests.loopback_hub import LoopbackHub, sharded_llama

MIB = 1 << 20
FILES = sharded_llama()  # 6 layers in 3 shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def library(folder: Path, tmp_path: Path) -> tuple[Path, Manifest]:
    """A data folder with the model published in it."""
    data_dir = tmp_path / "data"
    library = Library(data_dir)
    manifest = publish(str(folder), library.store)
    library.publish(Identity(bytes(32)), manifest)
    return data_dir, manifest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from node.cli import main; sys.argv[0] = 'azu-node'; main()"
    command = [sys.executable, "-c", code, "plan", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120
    )


def same_sizes(one: Manifest, other: Manifest) -> bool:
    return all(
        stage_memory(one, start, end, dtype, 100) == stage_memory(other, start, end, dtype, 100)
        for dtype in WEIGHT_FORMATS
        for start in range(one.n_layers)
        for end in range(start + 1, one.n_layers + 1)
    )


def test_a_folder_gives_what_publishing_it_gives(folder: Path, library: tuple[Path, Manifest]) -> None:
    assert same_sizes(describe(str(folder), folder), library[1])


def test_a_published_model_is_found_by_id_and_by_digest(library: tuple[Path, Manifest]) -> None:
    data_dir, manifest = library
    assert describe(manifest.digest, data_dir) == manifest
    assert describe(manifest.model_id, data_dir) == manifest
    with pytest.raises(InputError) as caught:
        describe("0" * 64, data_dir)
    assert caught.value.code == "unknown_model"


def test_of_a_hub_model_only_headers_are_fetched(tmp_path: Path, library: tuple[Path, Manifest]) -> None:
    # Weights larger than the first request, so that what is not fetched shows.
    files = sharded_llama(hidden=512)
    with LoopbackHub() as hub:
        hub.add("me/tiny", files)
        done = run("me/tiny", "--vram", "1GiB", "--dtype", "float32", "--json", **hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["model_id"], result["n_layers"]) == ("me/tiny", 6)
        weights = [name for name in files if name.endswith(".safetensors")]
        assert len(weights) == 3
        for name in weights:
            (asked,) = [one for one in hub.of(name) if one.sent]
            assert asked.sent <= (1 << 18) < len(files[name])


@pytest.mark.parametrize("memory", [12 * MIB, 25 * MIB, 30 * MIB, 45 * MIB, 1 << 40])
def test_what_is_said_to_fit_fits(library: tuple[Path, Manifest], memory: int) -> None:
    manifest = library[1]
    n = manifest.n_layers
    for fit in make_plan(manifest, memory, 4096, "float32").fits:
        for count, start in ((fit.first, 0), (fit.last, n - fit.last), (fit.middle, 1)):
            if count:
                assert stage_memory(manifest, start, start + count, fit.dtype, 4096).total <= memory
        if fit.first < n:
            assert stage_memory(manifest, 0, fit.first + 1, fit.dtype, 4096).total > memory
        assert (fit.workers > 0) == (fit.least <= memory and fit.first > 0 and fit.last > 0)
        assert fit.kv_tokens >= 4096 or not fit.workers
    assert make_plan(manifest, 1 << 40, 4096, "int4").fits[0].workers == 1


def test_the_parts_make_the_whole(library: tuple[Path, Manifest]) -> None:
    sizes = make_plan(library[1], MIB, 4096, "float16").sizes
    assert sizes.smallest_layer == sizes.largest_layer
    assert sizes.embeddings + sizes.head + 6 * sizes.largest_layer == sizes.whole
    assert sizes.kv_per_token == 2 * sum(cache.per_token for cache in library[1].caches)


def test_a_person_is_told_what_fits_and_what_would_help(library: tuple[Path, Manifest]) -> None:
    manifest = library[1]
    text = show(make_plan(manifest, 1 << 30, 4096, "float32"))
    assert all(dtype in text for dtype in WEIGHT_FORMATS)
    assert "What would help" not in text
    text = show(make_plan(manifest, MIB, 4096, "float32"))
    least = make_plan(manifest, MIB, 4096, "float32").fits[0].least
    assert f"Not a single layer fits in float32: the smallest stage takes {least / MIB:.1f} MiB" in text
    assert "--vram" in text


def test_a_smaller_format_is_named_where_it_is_enough(library: tuple[Path, Manifest]) -> None:
    manifest = library[1]
    least = {fit.dtype: fit.least for fit in make_plan(manifest, MIB, 1 << 20, "float32").fits}
    text = show(make_plan(manifest, least["float32"] - 1, 1 << 20, "float32"))
    assert "What would help: --dtype float16" in text


def test_it_needs_neither_torch_nor_the_network_for_a_folder(folder: Path) -> None:
    code = (
        "import sys; from node.cli import main\n"
        f"sys.argv = ['azu-node', 'plan', {str(folder)!r}, '--vram', '1GiB', '--dtype', 'int8', '--json']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["dtype"] == "int8"
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "libp2p", "huggingface_hub", "httpx2"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "unsupported_architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unsupported_quantization"),
        ({"num_hidden_layers": 9}, "unknown_layout"),
        ({"architectures": ["FooForCausalLM"]}, "unsupported_architecture"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(folder: Path, changes: dict[str, Any], code: str) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as caught:
        describe(str(folder), folder)
    assert caught.value.code == code


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    done = run(str(tmp_path / "nothing"), "--vram", "1GiB")
    assert (done.returncode, "does not exist" in done.stderr) == (2, True)
    done = run("./model.bin", "--vram", "1GiB", "--log-json")
    assert (done.returncode, json.loads(done.stderr)["fields"]["code"]) == (1, "unsafe_weights")
