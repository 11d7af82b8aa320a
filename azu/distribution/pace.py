"""A limit of bytes per second over everything that is sent: a token bucket, kept as the time when it is even again."""

from __future__ import annotations

__all__ = ["Pace"]

_BURST_S = 0.25  # after a pause, so much of a second's bytes may go at once


class Pace:
    """Pure: `now` is in seconds of any steady clock (the virtual scheduling of ITU-T I.371, annex A).

    Args:
        rate: bytes per second.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._even_at = 0.0

    def delay(self, size: int, now: float) -> float:
        """Books `size` bytes, and returns after how many seconds they may be sent."""
        start = max(self._even_at, now - _BURST_S)
        self._even_at = start + size / self._rate
        return max(0.0, start - now)
