"""Strangers' text made fit for a terminal, and the few forms that all of azu-dht's output shares."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from azu.records import Link, Speed
from azu.sizes import format_size

__all__ = [
    "clip",
    "duration",
    "is_relayed",
    "link_text",
    "milliseconds",
    "printable",
    "short_address",
    "short_digest",
    "short_id",
    "short_ids",
    "spans",
    "speed_text",
    "stretches",
]

_SHORTEST_ID = 8  # characters of a peer id's end; the beginning is the same in all of them
_DIGEST_CHARS = 12


def printable(text: str) -> str:
    """The text with every control, direction, zero-width and combining character written out as an escape.

    What is left neither moves the cursor nor changes how its neighbours are shown. It may still look like rich markup,
    so it belongs into a `rich.text.Text`, which does not read any.
    """
    return "".join(_shown(char) for char in unicodedata.normalize("NFC", text))


def _shown(char: str) -> str:
    if char.isprintable() and not unicodedata.category(char).startswith("M"):
        return char
    return char.encode("unicode_escape").decode()


def clip(text: str, longest: int | None) -> str:
    """At most `longest` characters, if that is given; what is cut off shows as an ellipsis."""
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def short_ids(peer_ids: Iterable[str]) -> dict[str, str]:
    """Each peer id's end, as long as it takes to tell these ids apart."""
    distinct = set(peer_ids)
    length = _SHORTEST_ID
    while len({each[-length:] for each in distinct}) < len(distinct):
        length += 1
    return {each: f"…{each[-length:]}" if len(each) > length else each for each in distinct}


def short_id(peer_id: str) -> str:
    """One peer id's end."""
    return short_ids([peer_id])[peer_id]


def is_relayed(address: str) -> bool:
    """Whether a multiaddr leads through a relay."""
    return "/p2p-circuit" in address


def short_address(address: str, peer_id: str, *, wide: bool) -> str:
    """A peer's multiaddr without the peer's own id; a relay's id shows as its end, unless `wide`."""
    parts = address.removesuffix(f"/p2p/{peer_id}").split("/")
    relays = {index for index, part in enumerate(parts) if index and parts[index - 1] == "p2p" and not wide}
    return printable("/".join(short_id(part) if index in relays else part for index, part in enumerate(parts)))


def short_digest(digest: str) -> str:
    """A digest's beginning."""
    return digest[:_DIGEST_CHARS]


def stretches(flags: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """The [start, end) of each run of true flags."""
    edges = [index for index in range(len(flags) + 1) if _at(flags, index) != _at(flags, index - 1)]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _at(flags: Sequence[bool], index: int) -> bool:
    return 0 <= index < len(flags) and flags[index]


def spans(ranges: Iterable[tuple[int, int]], most: int | None = None) -> str:
    """Ranges [start, end) as people count layers, last one included: "0-11, 15"; at most `most` of them."""
    texts = [f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in ranges]
    if most is not None and len(texts) > most:
        texts[most:] = [f"{len(texts) - most} more"]
    return ", ".join(texts)


def duration(seconds: float) -> str:
    """A record's age: "12 s", "3 min", "5 h", "2 d"."""
    whole = max(0, int(seconds))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if whole >= 2 * size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def milliseconds(seconds: float | None) -> str:
    """A round-trip time: "1.5 ms"; "-" for none."""
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def speed_text(speed: Speed) -> str:
    """How long passes take lately."""
    if not speed.decode_base_ns and not speed.decode_token_ns:
        return "not measured yet"
    base, token, prompt = (ns / 1e6 for ns in (speed.decode_base_ns, speed.decode_token_ns, speed.prefill_ns))
    decoding = f"{base:.2f} ms a layer and pass, {token:.2f} more for each token"
    return f"{decoding}, {prompt:.3f} for one of a prompt" if prompt else decoding


def link_text(link: Link) -> str:
    """How far a peer is."""
    rtt = f"{link.rtt_us / 1000:.1f} ms" if link.rtt_us else "no ping yet"
    rate = f", {format_size(link.bytes_per_s)}/s" if link.bytes_per_s else ""
    return f"{rtt}{rate}{', relayed' if link.relayed else ''}"
