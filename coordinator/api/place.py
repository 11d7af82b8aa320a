"""How far a client has read a stream: the id of its last event, which it sends back as `Last-Event-ID` to go on there.

    <stream>-<events>-<CRC-32 of their text>     the last two again for each further choice

The CRC tells a stream that goes on from one that was computed anew and came out differently. Ids are what the standard
of server-sent events has (WHATWG HTML, 9.2): who does not know them passes them over.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

from coordinator.api.errors import ApiError

__all__ = ["Place", "Read", "parse_place"]

_MOST_CHOICES = 64
_READ = r"-([0-9]{1,7})-([0-9a-f]{8})"
_PLACE = re.compile(rf"([0-9a-f]{{32}})((?:{_READ}){{1,{_MOST_CHOICES}}})", re.ASCII)


class Read(NamedTuple):
    """What has come of one choice: so many events. digest: CRC-32 of their text."""

    events: int = 0
    digest: int = 0

    def after(self, text: str) -> Read:
        """With one more event."""
        return Read(self.events + 1, zlib.crc32(text.encode(), self.digest))


@dataclass(frozen=True, slots=True)
class Place:
    """After some events of a stream; by default at the beginning of one with a single choice."""

    stream: str
    choices: tuple[Read, ...] = (Read(),)

    def __str__(self) -> str:
        return "-".join([self.stream, *(f"{read.events}-{read.digest:08x}" for read in self.choices)])

    def of(self, index: int) -> Read:
        """What has come of a choice."""
        return self.choices[index] if index < len(self.choices) else Read()

    def after(self, index: int, text: str) -> Place:
        """The place after one more event of a choice."""
        read = self.choices[index].after(text)
        return replace(self, choices=(*self.choices[:index], read, *self.choices[index + 1 :]))


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
    reads = re.findall(_READ, match[2])
    return Place(match[1], tuple(Read(int(events), int(digest, 16)) for events, digest in reads))
