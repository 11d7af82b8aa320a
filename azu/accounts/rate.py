"""How often somebody may ask: a token bucket for each, bounded in number. Sans-IO; time is an argument."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["RateLimit"]


class RateLimit:
    """At most `burst` at once and `per_s` a second in the long run, for each of who ask.

    Args:
        remembered: of so many at most it is known when they asked; who is forgotten, longest ago first, starts anew.
    """

    def __init__(self, *, burst: int, per_s: float, remembered: int = 10_000) -> None:
        self._burst = burst
        self._per_s = per_s
        self._remembered = remembered
        self._free_at: OrderedDict[str, float] = OrderedDict()  # when the bucket is full again

    def wait_s(self, who: str, now: float) -> float:
        """0 where `who` may, and has then; else the seconds until they may.

        Args:
            now: seconds on any clock that never goes back.
        """
        full_at = max(self._free_at.get(who, now), now)
        wait_s = full_at - now - (self._burst - 1) / self._per_s
        if wait_s > 1e-9:  # rounding must not refuse what is due
            return wait_s
        self._free_at[who] = full_at + 1 / self._per_s
        self._free_at.move_to_end(who)
        if len(self._free_at) > self._remembered:
            self._free_at.popitem(last=False)
        return 0.0
