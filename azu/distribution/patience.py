"""How long a fetch waits for what."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Patience"]


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds.

    Args:
        refresh: between two questions what a holder has by now.
        stall: without a byte, until a holder is left.
        piece: for one piece; with its 4 MiB this asks for 35 kB/s at least.
        retry: before a holder that could not be reached, or broke off, is tried again; doubled each time.
        busy: before a holder that has no room is asked again, on average.
        fallback: that nobody has a file, until it is fetched from where the model was published from.
        give_up: that nothing came, where nobody has some file.
        stuck: that nothing came, until who says that it has a file counts no more.
    """

    refresh: float = 2.0
    stall: float = 30.0
    piece: float = 120.0
    retry: float = 2.0
    busy: float = 4.0
    fallback: float = 5.0
    give_up: float = 60.0
    stuck: float = 600.0
