"""Memory as estimated before anything is loaded, against what a process that runs the stage really held."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.node.engine.memory_cases import CASES, LONGER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from Linux's /proc"),
]

TOLERANCE = 0.1
MIB = 1 << 20


def measured(folder: Path, device: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Each case's figures, in bytes."""
    if importlib.util.find_spec("torchao") is None:
        names = [name for name in names if not name.endswith("int8")]
    command = [sys.executable, "-m", "tests.node.engine.memory_cases", str(folder), device, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return {figures["case"]: figures for figures in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return measured(tmp_path_factory.mktemp("memory"), "cpu", CASES)


@pytest.mark.parametrize("name", LONGER)
def test_jobs_take_what_their_caches_should_and_leave_nothing(tmp_path: Path, name: str) -> None:
    figures = measured(tmp_path, "cpu", [name])[name]
    check_jobs(figures)
    assert figures["in_slots"] == [name == "jobs"]


def check_jobs(figures: dict[str, Any]) -> None:
    assert figures["grown"] == pytest.approx(figures["kv"], rel=TOLERANCE), figures
    assert figures["left"] < figures["kv"] * TOLERANCE, figures
    assert figures["left_of_many"] < figures["kv"] * TOLERANCE, figures


@pytest.mark.parametrize("name", CASES)
def test_resident_memory_is_as_estimated(on_cpu: dict[str, dict[str, Any]], name: str) -> None:
    if name not in on_cpu:
        pytest.skip(f"{name} needs a package that is not installed")
    check(on_cpu[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: its memory estimates are not checked here")
def test_cuda_memory_is_as_estimated(tmp_path: Path) -> None:
    found = measured(tmp_path, "cuda:0", [*LONGER, *CASES])
    for name in LONGER:
        check_jobs(found.pop(name))
    for figures in found.values():
        check(figures)


def check(figures: dict[str, Any]) -> None:
    peak = max(figures["load_peak"], figures["run_peak"])
    # The two are the same but where oneDNN compiles kernels for layers: how many depends on what jobs come.
    assert figures["least"] - TOLERANCE * peak <= peak <= figures["most"] + TOLERANCE * peak, figures
    # The weights alone, to the tensor; the rest is allocators' rounding and Python's modules.
    assert 0 <= figures["loaded"] - figures["weights"] <= 0.01 * figures["weights"] + 4 * MIB, figures
    assert figures["load_peak"] <= figures["weights"] + figures["loading"] + 32 * MIB, "a stage is not held twice"
