"""The C library's allocator and oneDNN's cache, set so that a stage's memory stays near what it holds.

By default glibc keeps the holes that freed tensors of up to 32 MiB leave in its heap; with chunks and caches of growing
sizes they came to as much as the KV cache itself. Blocks from 2 MiB on are mapped and unmapped one by one instead; the
system clears their pages each time, which for all of a small model's tensors would be a tenth of the time of a prompt.
oneDNN compiles a kernel for each new shape (on a CPU in bfloat16: for each number of rows) and keeps 1,024 of them. 64
are enough for a stage whose layers share about ten shapes.
"""

from __future__ import annotations

import ctypes
import os

from azu.models.memory import KEPT_KERNELS

__all__ = ["settle_allocator"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MAPPED_BYTES = 2 << 20
_KEPT_BYTES = 16 << 20  # at the heap's end


def settle_allocator() -> None:
    """Set both for this process; what its owner set in the environment stays. To be called before torch computes."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none, or ignore it
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
