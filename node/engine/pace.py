"""How long the passes of a loaded stage take, from all that were run: each new one counts a little. Pure: no clock.

A pass in which `n` jobs decode a token each takes about `base + n * token`: the base is the time to read the weights,
which they share. Both are fitted to the last hundred passes or so (least squares, older ones weigh ever less). What
makes all passes slower for a while, as another program does, is a factor of its own, which follows within ten passes:
else the fit would blame it on how many tokens happened to be in them. So what a token adds stays known while all passes
have as many. No pass counts as less than half or more than twice what was expected, so that a single stall is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from azu.records import Speed

__all__ = ["Pace"]

_KEPT = 0.98  # of all earlier passes' weight, at each that comes
_SMOOTH = 0.2  # weight of a new measurement of a prompt, and of the factor
_MOST = 2.0  # times what was expected, and one part of so many
_LEAST_ROWS = 16  # of a prompt in a pass: with fewer, reading the weights is what takes the time
_LONGEST_S = 1e3  # a machine may sleep in a pass; a record has to hold what was measured
_LEAST_VARIANCE = 0.05  # of the tokens in a pass


class Pace:
    """Of one loaded stage and its parts, per layer. Written by one thread, read by any.

    Args:
        shares_passes: whether several jobs' steps are computed in one pass; if not, there is no base.
    """

    def __init__(self, *, shares_passes: bool = True) -> None:
        self._shares_passes = shares_passes
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        # Sums over passes of tokens: weight, tokens, seconds (by the factor), tokens squared, tokens times seconds.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._token_s = 0.0
        self._factor = 1.0
        self._prefill_s = 0.0

    def note(self, seconds: float, layers: int, rows: Sequence[int]) -> None:
        """Count a pass through so many layers; `rows` of each step in it."""
        each = seconds / layers
        tokens, chunk_rows = sum(one == 1 for one in rows), sum(one for one in rows if one > 1)
        base, token = self._decode()
        expected = base + tokens * token if tokens else 0.0
        if not chunk_rows:
            self._note_tokens(_near(each, expected), tokens, expected)
        elif chunk_rows >= _LEAST_ROWS:
            alone = _near((each - expected) / chunk_rows, self._prefill_s)
            self._prefill_s += (alone - self._prefill_s) * (_SMOOTH if self._prefill_s else 1.0)

    def _note_tokens(self, each: float, tokens: int, expected: float) -> None:
        if expected:
            factor = self._factor * (1 + (each / expected - 1) * _SMOOTH)
            self._factor = min(max(factor, 1 / _LONGEST_S), _LONGEST_S)
        usual = each / self._factor
        new = (1.0, tokens, usual, tokens * tokens, tokens * usual)
        weight, n, s, nn, ns = (_KEPT * old + one for old, one in zip(self._sums, new, strict=True))
        self._sums = weight, n, s, nn, ns
        variance = nn / weight - (n / weight) ** 2
        if variance > _LEAST_VARIANCE:
            self._token_s = max(0.0, (ns / weight - n / weight * s / weight) / variance)

    def _decode(self) -> tuple[float, float]:
        """Seconds of a pass of tokens, per layer: whatever their number, and for each."""
        weight, tokens, seconds, _, _ = self._sums
        if not weight:
            return 0.0, 0.0
        mean = seconds / tokens
        token = min(self._token_s, mean) if self._shares_passes else mean
        return (seconds - token * tokens) / weight * self._factor, token * self._factor

    def speed(self) -> Speed:
        """As the worker's record has it."""
        base, token = self._decode()
        return Speed(decode_base_ns=_ns(base), decode_token_ns=_ns(token), prefill_ns=_ns(self._prefill_s))


def _near(seconds: float, expected: float) -> float:
    """A measurement, not too far from what was expected, if anything was."""
    if not expected:
        return max(0.0, seconds)
    return min(max(seconds, expected / _MOST), expected * _MOST)


def _ns(seconds: float) -> int:
    return round(min(max(0.0, seconds), _LONGEST_S) * 1e9)  # a difference may be below zero by a rounding error
