"""Where compute threads run: each in a process of its own, since torch's OpenMP reads the environment once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from node.engine.openmp import usable_cpus

ROOT = Path(__file__).parents[3]
# Prints which CPUs each thread may use: those that were there before a product, and the team that it made.
PROBE = """
import json, os, sys, threading
from node.engine.openmp import openmp_settled

threads, device = int(sys.argv[1]), sys.argv[2]
with openmp_settled(threads or None, device):
    import torch
torch.set_num_threads(threads or len(os.sched_getaffinity(0)))

def tasks():
    return {int(tid): sorted(os.sched_getaffinity(int(tid))) for tid in os.listdir("/proc/self/task")}

def compute():
    before = tasks()
    torch.ones(1 << 22).add_(1)
    team = {tid: cpus for tid, cpus in tasks().items() if tid not in before or tid == threading.get_native_id()}
    print(json.dumps({"main": tasks()[os.getpid()], "team": sorted(team.values()),
                      "told": {name: os.environ.get(name) for name in ("OMP_PROC_BIND", "GOMP_SPINCOUNT")}}))

thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""
CPUS = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU")


def placed(*arguments: str, cpus: Sequence[int] = CPUS, **environment: str) -> dict[str, object]:
    """What the probe says where it may use these CPUs."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = ["taskset", "-c", ",".join(map(str, cpus)), sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=cleared | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("threads", ["0", str(len(CPUS))])
def test_as_many_threads_as_cpus_have_one_each_and_the_event_loop_has_all(threads: str) -> None:
    found = placed(threads, "cpu")
    assert found["team"] == [[cpu] for cpu in CPUS]
    assert found["main"] == CPUS
    assert found["told"] == {"OMP_PROC_BIND": None, "GOMP_SPINCOUNT": "10000"}, "what this program starts is not bound"


def test_fewer_threads_than_cpus_share_them_with_other_workers() -> None:
    found = placed(str(len(CPUS) - 1), "cpu")
    assert found["team"] == [CPUS] * (len(CPUS) - 1)


def test_only_the_cpus_that_it_may_use_count() -> None:
    assert placed("1", "cpu", cpus=CPUS[1:2])["team"] == [CPUS[1:2]]
    assert usable_cpus() == len(CPUS)


def test_the_thread_that_feeds_a_gpu_is_left_where_it_is() -> None:
    assert placed("0", "cuda:0")["team"] == [CPUS] * len(CPUS)


@pytest.mark.parametrize("setting", [("OMP_PROC_BIND", "false"), ("OMP_PLACES", "threads"), ("GOMP_CPU_AFFINITY", "0")])
def test_what_the_environment_says_stays(setting: tuple[str, str]) -> None:
    name, value = setting
    found = placed("0", "cpu", **{name: value, "OMP_WAIT_POLICY": "passive"})
    told = found["told"]
    assert isinstance(told, dict)
    assert told["OMP_PROC_BIND"] == ("false" if name == "OMP_PROC_BIND" else None)
    assert told["GOMP_SPINCOUNT"] is None
    if name == "OMP_PROC_BIND":
        assert found["team"] == [CPUS] * len(CPUS)
