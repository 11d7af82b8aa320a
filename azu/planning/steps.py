"""Work that can be done a little at a time, so that whoever has to stay responsive can do something else in between."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

__all__ = ["Steps", "finish"]

T = TypeVar("T")

# Yields every millisecond or less, and returns what came of it.
Steps = Generator[None, None, T]


def finish(steps: Steps[T]) -> T:
    """All of it at once."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
