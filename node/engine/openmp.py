"""How torch's OpenMP treats its threads. It reads the environment once, as torch loads: nothing here imports that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["openmp_settled", "usable_cpus"]

# Iterations for which a thread waits awake for more work: some 30 microseconds.
_SPINS = "10000"
_PLACES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# There where a GPU's driver runs, NVIDIA's or AMD's.
_GPUS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def usable_cpus() -> int:
    """CPUs that this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def openmp_settled(threads: int | None, device: str) -> Iterator[None]:
    """Where torch is to be loaded for the first time.

    Compute threads spin until a pass goes on, and sleep soon after it; else they take the cores from this machine's
    other workers. And where there is one for each CPU, each has its own: a pass waits for its slowest thread, and the
    system may leave two on one CPU for a second. docs/performance.md measures both. What the environment says stays.

    Args:
        threads: that compute; None for one for each usable CPU.
        device: as a worker's settings have it. A GPU is fed by one thread, which is best left where it is.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    if not _can_bind() or threads not in (None, usable_cpus()) or not _computes_on_cpu(device):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.environ["OMP_PROC_BIND"] = "true"
    try:
        yield
    finally:
        del os.environ["OMP_PROC_BIND"]  # not for programs that this one starts
        os.sched_setaffinity(0, cpus)  # OpenMP has bound the thread that loaded it, which does not compute


def _can_bind() -> bool:
    return hasattr(os, "sched_setaffinity") and not any(name in os.environ for name in _PLACES)


def _computes_on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not any(path.exists() for path in _GPUS))
