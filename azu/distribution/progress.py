"""How far a fetch is, for whoever watches: the terminal and the worker's record."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["FetchProgress"]


@dataclass
class FetchProgress:
    """Bytes of files that are verified and here, of all that are wanted, and bytes that each source has sent.

    `coming` are those of a file that comes from the hub, which is verified as a whole.
    """

    done: int = 0
    total: int = 0
    coming: int = 0
    sources: dict[str, int] = field(default_factory=dict)

    @property
    def percent(self) -> int:
        """0 to 100, rounded down."""
        return 100 * min(self.here, self.total) // self.total if self.total else 0

    @property
    def here(self) -> int:
        """Bytes that came so far."""
        return self.done + self.coming

    def add(self, source: str, size: int) -> None:
        """Note verified bytes."""
        self.done += size
        self.sources[source] = self.sources.get(source, 0) + size
