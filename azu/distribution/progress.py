"""How far a fetch is, for whoever watches: the terminal and the worker's record."""

from __future__ import annotations

from dataclasses import dataclass, field

from azu.sizes import format_size

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

    def text(self, rate: int, peers: int) -> str:
        """For a person: "fetching layers: 53%, 240.1 MiB of 448.6 MiB, 7.6 MiB/s from 1 peer, 27 s left".

        Args:
            rate: bytes per second.
            peers: that send.
        """
        source = "the hub" if self.coming else f"{peers} peer{'' if peers == 1 else 's'}"
        left = f", {max(0, self.total - self.here) / rate:.0f} s left" if rate else ""
        sizes = f"{format_size(self.here)} of {format_size(self.total)}"
        return f"fetching layers: {self.percent}%, {sizes}, {format_size(rate)}/s from {source}{left}"

    def add(self, source: str, size: int) -> None:
        """Note verified bytes."""
        self.done += size
        self.sources[source] = self.sources.get(source, 0) + size
