"""How many turns of the event loop something takes, where that is what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

__all__ = ["Turns", "counted_turns"]


class Turns(trio.abc.Instrument):
    """Those that ended since it was made."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@contextmanager
def counted_turns() -> Iterator[Turns]:
    """Count until the context is left."""
    turns = Turns()
    trio.lowlevel.add_instrument(turns)
    try:
        yield turns
    finally:
        trio.lowlevel.remove_instrument(turns)
