"""A look-up's path as a tree for people, and as a document for programs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from azu.dht.screen import Row
from azu.dht.text import clip, milliseconds, printable, short_ids
from azu.overlay import Hop, Trace

__all__ = ["trace_document", "trace_rows", "trace_summary"]

_LONGEST_ERROR = 60  # characters
_MOST_CLOSEST = 5


def trace_rows(trace: Trace, *, wide: bool) -> list[Row]:
    """One row a peer, below the peer that named it; HOP is the order in which they were asked."""
    ids = _shown(trace, wide)
    named_by = _parents(trace.hops)
    return [
        {
            "PEER": f"{branch}{ids[trace.hops[index].peer_id]}",
            "HOP": f"#{index + 1}",
            "PATH": str(trace.hops[index].path),
            "BITS": str(trace.hops[index].shared_bits),
            "NAMED BY": "here" if parent is None else ids[trace.hops[parent].peer_id],
            "TIME": milliseconds(trace.hops[index].seconds),
            "NAMED": str(trace.hops[index].named),
            "ERROR": _error(trace.hops[index], wide) or "-",
        }
        for branch, index in _branches(named_by, None, "")
        for parent in (named_by[index],)
    ]


def trace_summary(trace: Trace, seconds: float, *, wide: bool) -> str:
    """How many were asked, how many answered, and who is closest."""
    ids = _shown(trace, wide)
    asked, silent = len(trace.hops), sum(hop.seconds is None for hop in trace.hops)
    paths = len({hop.path for hop in trace.hops})
    closest = ", ".join(ids[each] for each in trace.closest[: None if wide else _MOST_CLOSEST])
    return (
        f"{asked} {'peer' if asked == 1 else 'peers'} asked on {paths} {'path' if paths == 1 else 'paths'} in "
        f"{seconds:.2f} s, {silent} without an answer\n"
        f"closest to the key: {closest or 'nobody'}"
    )


def trace_document(trace: Trace, text: str, seconds: float) -> dict[str, Any]:
    """The look-up in the order asked. key: what was looked up, in hex."""
    hops = [
        {
            "peer_id": hop.peer_id,
            "path": hop.path,
            "named_by": hop.named_by,
            "shared_bits": hop.shared_bits,
            "time_ms": None if hop.seconds is None else round(hop.seconds * 1000, 2),
            "named": hop.named,
            "error": hop.error or None,
        }
        for hop in trace.hops
    ]
    return {
        "asked_for": text,
        "key": trace.key.hex(),
        "seconds": round(seconds, 3),
        "hops": hops,
        "closest": list(trace.closest),
    }


def _shown(trace: Trace, wide: bool) -> dict[str, str]:
    everybody = {*trace.closest, *(hop.peer_id for hop in trace.hops)}
    return {each: each for each in everybody} if wide else short_ids(everybody)


def _error(hop: Hop, wide: bool) -> str:
    return clip(printable(hop.error), None if wide else _LONGEST_ERROR)


def _parents(hops: Sequence[Hop]) -> list[int | None]:
    """Each hop's parent: the one that named it, which was asked before it."""
    first: dict[str, int] = {}
    parents: list[int | None] = []
    for index, hop in enumerate(hops):
        parents.append(None if hop.named_by is None else first.get(hop.named_by))
        first.setdefault(hop.peer_id, index)
    return parents


def _branches(parents: Sequence[int | None], parent: int | None, indent: str) -> Iterator[tuple[str, int]]:
    """Hops in the tree's order, each with the lines that lead to it."""
    children = [index for index, each in enumerate(parents) if each == parent]
    for index in children:
        if parent is None:
            yield "", index
            yield from _branches(parents, index, "")
            continue
        is_last = index == children[-1]
        yield f"{indent}{'└─' if is_last else '├─'}", index
        yield from _branches(parents, index, f"{indent}{'  ' if is_last else '│ '}")
