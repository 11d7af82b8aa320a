"""KV caches of several jobs at even distances in memory, so that one call attends for all of them.

Attention of one decoded token is little work: called for each job and layer, it is mostly overhead. One call computes
it for several jobs where their keys are one tensor [jobs, heads, positions, width]. So each job has a slot in such
tensors. They span addresses, not memory: a page of an anonymous mapping takes memory when it is written to, and is
given back when its job ends. Only for CPUs: a GPU has no such pages.
"""

from __future__ import annotations

import heapq
import mmap
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from azu.models.memory import MAX_JOBS

__all__ = ["POSITIONS", "Slot", "Slots", "has_slots"]

# A longer job's own attention takes so long that a call of its own costs little; and its addresses would be many.
POSITIONS = 2_048
_OVERCOMMIT, _STRICT = Path("/proc/sys/vm/overcommit_memory"), "2"  # proc_sys_vm(5)


def has_slots(device: torch.device) -> bool:
    """Whether a device's memory is such: elsewhere the system has other ways to give pages back, and where Linux may
    promise no more memory than it has, addresses would use that up.
    """
    return device.type == "cpu" and sys.platform == "linux" and _OVERCOMMIT.read_text().strip() != _STRICT


class Slots:
    """Those of one stage. A slot is given back once nobody refers to it."""

    def __init__(self) -> None:
        self._free = list(range(MAX_JOBS))  # a heap: jobs lie close together
        self._rows: dict[tuple[int, int], _Rows] = {}

    def take(self) -> Slot | None:
        """A slot, or None where all are taken."""
        if not self._free:
            return None
        slot = Slot(self, heapq.heappop(self._free))
        weakref.finalize(slot, self._give_back, slot.number).atexit = False
        return slot

    def rows(self, layer: int, kind: int) -> torch.Tensor:
        """The keys (kind 0) or values (kind 1) of all slots, [slots, heads, POSITIONS, width]; `Slot.rows` made it."""
        return self._rows[layer, kind].tensor

    def _make(self, layer: int, kind: int, like: torch.Tensor) -> None:
        if (layer, kind) not in self._rows:
            self._rows[layer, kind] = _Rows(like)

    def _give_back(self, number: int) -> None:
        for rows in list(self._rows.values()):
            rows.clear(number)
        heapq.heappush(self._free, number)


class Slot:
    """One job's."""

    def __init__(self, slots: Slots, number: int) -> None:
        self.slots = slots
        self.number = number

    def rows(self, layer: int, kind: int, like: torch.Tensor) -> torch.Tensor:
        """Its keys (kind 0) or values (kind 1) in a layer, [1, heads, POSITIONS, width], heads and width as `like`.

        Raises:
            OSError: the system gives no such mapping.
        """
        self.slots._make(layer, kind, like)
        return self.slots.rows(layer, kind)[self.number : self.number + 1]


class _Rows:
    """The keys or the values of one layer, of all slots."""

    def __init__(self, like: torch.Tensor) -> None:
        _, heads, _, width = like.shape
        item = like.dtype.itemsize
        pages = -(-heads * POSITIONS * width * item // mmap.PAGESIZE)
        self._bytes = pages * mmap.PAGESIZE  # of a slot
        self._map = mmap.mmap(-1, MAX_JOBS * self._bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that knows no huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # one would take memory for positions that nobody has
        shape = MAX_JOBS, heads, POSITIONS, width
        strides = self._bytes // item, POSITIONS * width, width, 1
        with torch.inference_mode(mode=False):  # what is made in it cannot be written to outside of it
            self.tensor = torch.frombuffer(self._map, dtype=like.dtype).as_strided(shape, strides)

    def clear(self, number: int) -> None:
        """Give a slot's memory back; who reads it then finds zeros."""
        self._map.madvise(mmap.MADV_DONTNEED, number * self._bytes, self._bytes)
