"""Memory that pieces come in, used again: a new one is filled with zeros first, page by page, for each 4 MiB."""

from __future__ import annotations

from azu.wire.messages import MAX_RANGE_BYTES

__all__ = ["Buffers"]

_KEPT = 4  # 16 MiB at most, for the time of one fetch


class Buffers:
    """Of one fetch. Only whole pieces' are kept: most pieces are."""

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """A buffer of `size` bytes, with anything in it."""
        return self._spare.pop() if size == MAX_RANGE_BYTES and self._spare else bytearray(size)

    def give_back(self, buffer: bytearray) -> None:
        """Nobody uses it any more."""
        if len(buffer) == MAX_RANGE_BYTES and len(self._spare) < _KEPT:
            self._spare.append(buffer)
