"""`azu-coordinator shard`, `models` and `remove` as an operator runs them, against a hub on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from azu.distribution import Library
from azu.models.store import LayerStore
from coordinator.catalogue import MAX_MODELS, Catalogue, Listed
from coordinator.cli import main
from coordinator.shards import hold_lock
from tests.loopback_hub import LoopbackHub, sharded_llama

PROGRAM = Path(sys.executable).with_name("azu-coordinator")
FILES = sharded_llama(n_layers=10, hidden=256)
SHARDS = sorted(name for name in FILES if name.endswith(".safetensors"))
PATIENCE_S = 60.0


class Operator:
    """Runs the program on one data folder."""

    def __init__(self, hub: LoopbackHub, folder: Path) -> None:
        self.data_dir = folder / "data"
        self._environment = {**os.environ, **hub.environment(folder / "hf")}

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [str(PROGRAM), *words, "--data-dir", str(self.data_dir)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self._environment)

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def shard(self, *words: str) -> dict[str, Any]:
        code, out, err = self.run("shard", *words, "--json")
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def here(self, *words: str) -> Result:
        """Run a command that is no program of its own for long, in this process."""
        return CliRunner().invoke(main, [*words, "--data-dir", str(self.data_dir)], terminal_width=200)

    def blobs(self) -> int:
        return len(list((self.data_dir / "layers/blobs").glob("??/*")))


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as made:
        made.add("me/tiny", FILES)
        yield made


@pytest.fixture
def operator(hub: LoopbackHub, tmp_path: Path) -> Operator:
    return Operator(hub, tmp_path)


def test_what_the_operator_sees(hub: LoopbackHub, operator: Operator) -> None:
    code, out, err = operator.run("shard", "me/tiny")
    assert code == 0, err
    (first,) = (manifest for _, manifest in Library(operator.data_dir).manifests())
    lines = out.splitlines()
    assert lines[0] == "me/tiny"
    assert lines[1:4] == [f"  revision  {first.revision}", f"  manifest  {first.digest}", "  layers    10"]
    assert f"({sum(blob.size for blob in first.blobs()):,} bytes)" in lines[4]
    assert lines[5].startswith("  seconds")
    assert list(dict.fromkeys(line.split(":")[0] for line in err.splitlines())) == [
        "downloading",
        "verifying",
        "cutting",
    ]

    check_prune(operator)
    before = len(hub.asked)
    again = operator.shard("me/tiny")
    assert (again["unchanged"], again["manifest"]) == (True, first.digest)
    assert {asked.name for asked in hub.asked[before:]} == {""}

    # A new revision takes the place of the old one, whose files go.
    commit = hub.add("me/tiny", {**FILES, SHARDS[0]: FILES[SHARDS[0]][:-4] + b"\0\0\0\0"})
    new = operator.shard("me/tiny")
    assert (new["revision"], new["unchanged"]) == (commit, False)
    kept = dict(Library(operator.data_dir).manifests())[new["manifest"]]
    store = LayerStore(operator.data_dir / "layers")
    assert all(store.has(blob.digest) for blob in kept.blobs())
    assert not all(store.has(blob.digest) for blob in first.blobs())

    assert operator.here("models").stdout.splitlines()[1].split()[:3] == ["me/tiny", commit[:12], kept.digest[:12]]
    lost = store.path(kept.layers[3].digest)
    lost.rename(operator.data_dir / "lost")
    assert "incomplete" in operator.here("models").stdout
    assert json.loads(operator.here("models", "--json").stdout)["models"][0]["complete"] is False
    (operator.data_dir / "lost").rename(lost)
    assert operator.here("remove", "me/tiny").stdout.startswith("removed me/tiny, ")
    assert operator.here("models").stdout == "no models; add one with: azu-coordinator shard MODEL\n"
    assert sum(store.size(digest) for digest in store.digests()) < 100_000  # manifests, no layers
    result = operator.here("remove", "me/tiny")
    assert result.exit_code == 2
    assert result.stderr.startswith("azu-coordinator: error: me/tiny is not listed\n  remedy: Listed are: none.")


def check_prune(operator: Operator) -> None:
    """What a killed cut left goes, and nothing else."""
    store = Library(operator.data_dir).store
    before = {path: path.stat().st_ino for path in store.root.rglob("*") if path.is_file()}
    orphan = store.put_bytes(b"a layer of a cut that was killed")
    (store.root / "cutting" / ("a" * 64)).write_text("[]")
    with hold_lock(operator.data_dir / "shard.lock", lambda _: None):
        refused = operator.here("prune")
    assert (refused.exit_code, store.has(orphan.digest)) == (1, True)
    assert "a model is being cut into this data folder" in refused.stderr
    assert json.loads(operator.here("prune", "--json").stdout) == {"freed_bytes": 32}
    assert {path: path.stat().st_ino for path in store.root.rglob("*") if path.is_file()} == before


def test_errors_name_a_remedy(hub: LoopbackHub, operator: Operator) -> None:
    hub.add("me/pickles", {"config.json": FILES["config.json"], "pytorch_model.bin": b"\x80\x04"})
    code, out, err = operator.run("shard", "me/pickles")
    assert (code, out) == (1, "")
    assert err.splitlines()[-2:] == [
        "azu-coordinator: error: me/pickles has only pickled weights",
        "  remedy: Convert it to safetensors, or publish a repository that has them.",
    ]
    assert not (operator.data_dir / "models.json").exists()


def test_one_model_too_many_is_refused_before_its_download(hub: LoopbackHub, operator: Operator) -> None:
    operator.data_dir.mkdir(mode=0o700)
    for number in range(MAX_MODELS):
        Catalogue(operator.data_dir).add(Listed(f"m{number}", f"{number:064x}"))
    code, out, err = operator.run("shard", "me/tiny")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "azu-coordinator: error: 64 models are listed already",
        "  remedy: Remove one: azu-coordinator remove MODEL_ID.",
    ]
    assert {asked.name for asked in hub.asked} == {""}, "no file was asked for"
    assert operator.blobs() == 0


def test_a_full_disk_leaves_nothing_half_written(hub: LoopbackHub, operator: Operator, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses the write just so."""
    words = [str(PROGRAM), "shard", "me/tiny", "--data-dir", str(operator.data_dir)]
    limit = len(FILES[SHARDS[0]]) // 1024 // 2
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "limited", *words],
        capture_output=True, text=True, env=operator._environment, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 1
    assert "me/tiny cannot be stored in the hub's cache" in done.stderr
    assert "remedy: Free some disk space" in done.stderr
    assert list(tmp_path.rglob("*.incomplete")) == []
    assert operator.blobs() == 0


def test_an_interrupted_command_ends_at_once(hub: LoopbackHub, operator: Operator, tmp_path: Path) -> None:
    hub.rate = 1_000_000
    process = operator.start("shard", "me/tiny")
    deadline = time.monotonic() + PATIENCE_S
    while not list(tmp_path.rglob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert time.monotonic() - started < 10  # the download would take longer
