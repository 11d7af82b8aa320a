"""How far a client has read a stream: the id of its last event, which it sends back as `Last-Event-ID` to go on there.

    <stream>-<events>-<CRC-32 of their text>

The CRC tells a stream that goes on from one that was computed anew and came out differently. Ids are what the standard
of server-sent events has (WHATWG HTML, 9.2): who does not know them passes them over.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

from coordinator.api.errors import ApiError

__all__ = ["Place", "parse_place"]

_PLACE = re.compile(r"([0-9a-f]{32})-([0-9]{1,7})-([0-9a-f]{8})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """After so many events of a stream; by default at its beginning. digest: CRC-32 of their text."""

    stream: str
    events: int = 0
    digest: int = 0

    def __str__(self) -> str:
        return f"{self.stream}-{self.events}-{self.digest:08x}"

    def after(self, text: str) -> Place:
        """The place after one more event."""
        return replace(self, events=self.events + 1, digest=zlib.crc32(text.encode(), self.digest))


def parse_place(text: str) -> Place:
    """An event's id.

    Raises:
        ApiError: status 400, code "invalid_last_event_id".
    """
    match = _PLACE.fullmatch(text)
    if match is None:
        raise ApiError(
            "Last-Event-ID is no id of an event of this coordinator's streams",
            code="invalid_last_event_id",
            remedy="Send the id of the last event that came, or leave the header out.",
        )
    return Place(match[1], int(match[2]), int(match[3], 16))
