"""Long computations on the event loop, which has to answer others meanwhile."""

from __future__ import annotations

import time
from typing import TypeVar

import trio

from azu.planning.steps import Steps

__all__ = ["in_slices"]

T = TypeVar("T")

_SLICE_S = 0.004


async def in_slices(steps: Steps[T]) -> T:
    """All of it, a few milliseconds at a time. What it was made of may be out of date when it returns."""
    while True:
        ends_at = time.perf_counter() + _SLICE_S
        try:
            while time.perf_counter() < ends_at:
                next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        await trio.lowlevel.checkpoint()
