"""How far the import of a model is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Progress", "Report", "silent"]


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total`: bytes while downloading and verifying, files while cutting. `item` is the one at hand.

    "waiting" (for another process) counts nothing.
    """

    stage: Literal["waiting", "downloading", "verifying", "cutting"]
    item: str
    done: int
    total: int


Report = Callable[[Progress], None]
"""Called with every step, from the thread that works. Whatever it raises ends the import, which can be resumed."""


def silent(_progress: Progress) -> None:
    """Reports to nobody."""
