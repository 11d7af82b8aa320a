"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from azu.errors import InputError

__all__ = ["format_size", "parse_size"]

_UNITS = ("KiB", "MiB", "GiB", "TiB")
_BINARY = {letter: 1024**power for power, letter in enumerate("KMGT", 1)}
_DECIMAL = {letter: 1000**power for power, letter in enumerate("KMGT", 1)}
_FORM = re.compile(
    r"(?P<number>\d{1,18}(?:\.\d{1,9})?)\s*(?:(?P<letter>[KMGT])(?P<kind>iB|B|i)?|B)?", re.IGNORECASE | re.ASCII
)
_LARGEST = 2**63 - 1  # bytes; what a signed 64-bit field on the wire can say


def parse_size(text: str | int) -> int:
    """Bytes from "8GiB", "1.5 GiB", "500MB", "8G" or a plain number of bytes.

    KiB, MiB, GiB and TiB count in 1024s, and so do the bare letters K, M, G and T; KB, MB, GB and TB count in 1000s.

    Raises:
        InputError: not such a form, zero, negative, or past 2**63 - 1.
    """
    match = _FORM.fullmatch(str(text).strip()) if not isinstance(text, bool) else None
    if match is None:
        raise _refused(text)
    letter, kind = (match["letter"] or "").upper(), (match["kind"] or "").lower()
    factor = 1 if not letter else _DECIMAL[letter] if kind == "b" else _BINARY[letter]
    size = int(Fraction(match["number"]) * factor)
    if not 0 < size <= _LARGEST:
        raise _refused(text)
    return size


def _refused(text: object) -> InputError:
    return InputError(
        f"{str(text)[:40]!r} is not a size",
        code="bad_size",
        remedy='write it like "8GiB" or "1.5GiB" (1024s), "500MB" (1000s), or as a number of bytes, and more than zero',
    )


def format_size(size: int) -> str:
    """A size for people, in 1024s with one decimal: "7.5 GiB", "512 B"."""
    if abs(size) < 1024:
        return f"{size} B"
    power = 1
    while power < len(_UNITS) and abs(size) / 1024**power >= 1023.95:  # 1024.0, once rounded, is 1.0 of the next unit
        power += 1
    return f"{size / 1024**power:.1f} {_UNITS[power - 1]}"
