"""The peers of a snapshot as a table for people, and as a document for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from azu.config import DhtSettings
from azu.dht.coverage import STATES, held_layers, names_of
from azu.dht.screen import Row, is_roomy, show_rows
from azu.dht.snapshot import Seen, Snapshot
from azu.dht.text import (
    clip,
    duration,
    milliseconds,
    printable,
    short_address,
    short_digest,
    short_ids,
    spans,
    stretches,
)
from azu.records import CoordinatorRecord, Record, WorkerRecord
from azu.sizes import format_size
from azu.tickets import MAX_STAGES

__all__ = ["held_states", "left_out", "nobody", "peer_rows", "peers_document", "show_peers", "summary", "way_in"]


@dataclass(frozen=True, slots=True)
class _Style:
    """How much to show of what may be long; None for all of it. Lengths in characters."""

    ids: Mapping[str, str]  # as shown
    names: Mapping[str, str]  # models', by manifest
    now: float
    device: int | None = 28
    model: int | None = 32
    address: int | None = 54  # a whole IPv6 address and a port
    agent: int | None = 24
    models: int | None = 4  # lines in one cell
    addresses: int | None = 1


def show_peers(console: Console, snapshot: Snapshot, *, wide: bool) -> None:
    """The peers as a table, or as cards; there must be one."""
    show_rows(console, peer_rows(snapshot, wide=wide or is_roomy(console)), optional=("AGENT", "ADDRESSES"))


def peer_rows(snapshot: Snapshot, *, wide: bool) -> list[Row]:
    """One row a peer: coordinators, then workers in the order of the layers that they have loaded."""
    records = [seen.record for seen in (*snapshot.coordinators, *snapshot.workers)]
    ids = [record.peer_id for record in records]
    names = names_of(snapshot)
    if wide:
        full = {each: each for each in ids}
        style = _Style(full, names, snapshot.taken_at, None, None, None, None, None, None)
    else:
        style = _Style(short_ids(ids), names, snapshot.taken_at)
    coordinators = sorted(snapshot.coordinators, key=lambda seen: seen.record.peer_id)
    workers = sorted(snapshot.workers, key=lambda seen: _ring_order(seen.record))
    return [
        *(_coordinator_row(seen, style) for seen in coordinators),
        *(_worker_row(seen, style) for seen in workers),
    ]


def peers_document(snapshot: Snapshot) -> dict[str, Any]:
    """Everything that the live records say, untouched, with what was measured."""
    names = names_of(snapshot)
    coordinators = [_entry("coordinator", seen, snapshot.taken_at) for seen in snapshot.coordinators]
    workers = [_entry("worker", seen, snapshot.taken_at) for seen in snapshot.workers]
    for worker in workers:
        worker["ranges"] = [{**held, "model_id": names.get(held["manifest"])} for held in worker["ranges"]]
    return {"peers": [*coordinators, *workers], **left_out(snapshot)}


def left_out(snapshot: Snapshot) -> dict[str, Any]:
    """What a document tells of what is not in it."""
    ahead = snapshot.clock_ahead
    return {
        "expired": snapshot.expired,
        "early": snapshot.early,
        "without_record": snapshot.silent,
        "clock_ahead_s": None if ahead is None else round(ahead),
    }


def summary(snapshot: Snapshot) -> str:
    """How many of what, and what was left out."""
    parts = [_count(len(snapshot.coordinators), "coordinator"), _count(len(snapshot.workers), "worker")]
    if snapshot.expired:
        parts.append(f"{_count(snapshot.expired, 'expired record')} left out")
    if snapshot.early:
        parts.append(f"{_count(snapshot.early, 'record')} dated in the future left out")
    if snapshot.silent:
        parts.append(f"{_count(snapshot.silent, 'peer')} announced without a record")
    return "; ".join([", ".join(parts[:2]), *parts[2:]])


def way_in(settings: DhtSettings) -> str:
    """What to type after --bootstrap to join the same swarm."""
    key = "" if settings.swarm_key is None else f" --swarm-key {settings.swarm_key}"
    return f"{settings.bootstrap[0]}{key}"


def nobody(snapshot: Snapshot, way_in: str) -> str:
    """What to say, and to advise, where there is neither a worker nor a coordinator."""
    if snapshot.clock_ahead is not None:
        ahead = snapshot.clock_ahead
        return (
            f"Peers answer here, but their records {'have expired' if ahead > 0 else 'are dated in the future'}: this "
            f"machine's clock is about {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} theirs.\n"
            "  to compare:  date -u\n"
            "  to set it:   timedatectl set-ntp true"
        )
    lines = [
        "This swarm has no workers and no coordinators right now.",
        f"  to add a worker:       azu-node join {way_in}",
        f"  to add a coordinator:  azu-coordinator serve --bootstrap {way_in} --model PATH_OR_HUB_ID",
    ]
    if snapshot.expired:
        lines.append(
            f"  Expired records left out: {snapshot.expired}. Those peers do not answer: they are gone, or cut off."
        )
    if snapshot.early:
        lines.append(f"  Records dated in the future: {snapshot.early}. Compare this machine's clock: date -u")
    if snapshot.silent:
        lines.append(f"  Announced without a record: {snapshot.silent}. They are just starting, or gone.")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _ring_order(record: WorkerRecord) -> tuple[bool, str, int, str]:
    first = min(((held.manifest, held.start) for held in record.ranges if held.state == "loaded"), default=None)
    return (first is None, *(first or ("", 0)), record.peer_id)


def _entry(kind: str, seen: Seen[Record], now: float) -> dict[str, Any]:
    measured = {
        "kind": kind,
        "age_s": round(max(0.0, now - seen.record.issued_at), 1),
        "rtt_ms": None if seen.pong is None else round(seen.pong.rtt * 1000, 2),
        "path": None if seen.pong is None else seen.pong.route,
    }
    return {"peer_id": seen.record.peer_id, **measured, **seen.record.model_dump(mode="json")}


def _coordinator_row(seen: Seen[CoordinatorRecord], style: _Style) -> Row:
    offers = [
        f"{clip(printable(offer.model_id), style.model)}: {offer.n_layers} offered" for offer in seen.record.models
    ]
    return _row(seen, style, {"KIND": "coordinator", "LAYERS": _lines(offers, style.models)})


def _worker_row(seen: Seen[WorkerRecord], style: _Style) -> Row:
    record = seen.record
    own = {
        "KIND": "worker",
        "DEVICE": clip(printable(record.device), style.device) or "-",
        "VRAM FREE": f"{format_size(record.vram_free)} / {format_size(record.vram_total)}",
        "LAYERS": _lines(_holdings(record, style), style.models),
        "JOBS": f"{record.jobs}, {record.waiting} wait" if record.waiting else str(record.jobs),
        "MS/LAYER": f"{record.layer_us / 1000:.2f}" if record.layer_us else "-",
    }
    return _row(seen, style, own)


def _row(seen: Seen[Record], style: _Style, own: Mapping[str, str]) -> Row:
    record = seen.record
    addresses = [short_address(each, record.peer_id, wide=style.address is None) for each in record.addrs]
    return {
        "PEER": style.ids[record.peer_id],
        **dict.fromkeys(("KIND", "DEVICE", "VRAM FREE", "LAYERS", "JOBS", "MS/LAYER"), "-"),
        **own,
        "AGE": duration(style.now - record.issued_at),
        "RTT": milliseconds(None if seen.pong is None else seen.pong.rtt),
        "PATH": "-" if seen.pong is None else seen.pong.route,
        "AGENT": clip(printable(record.agent), style.agent) or "-",
        "ADDRESSES": _lines([clip(each, style.address) for each in addresses], style.addresses),
    }


def _holdings(record: WorkerRecord, style: _Style) -> list[str]:
    """A line a model: "SmolLM2-135M-Instruct: 0-11 loaded, 12-17 cached"."""
    lines = []
    for manifest in dict.fromkeys(held.manifest for held in record.ranges):
        digest = manifest if style.model is None else short_digest(manifest)
        name = printable(style.names[manifest]) if manifest in style.names else digest
        lines.append(f"{clip(name, style.model)}: {held_states(record, manifest, style.models)}")
    return lines


def held_states(record: WorkerRecord, manifest: str, most: int | None) -> str:
    """What a worker has of a model, "0-11 loaded, 12-17 cached"; what is loaded is not named again."""
    seen_already: set[int] = set()
    parts = []
    for state in STATES:
        layers = held_layers(record.ranges, manifest, state, MAX_STAGES) - seen_already
        seen_already |= layers
        if layers:
            flags = [layer in layers for layer in range(max(layers) + 1)]
            parts.append(f"{spans(stretches(flags), most)} {state}{_percent(record, manifest, state)}")
    return ", ".join(parts) or "nothing"


def _percent(record: WorkerRecord, manifest: str, state: str) -> str:
    """How far the files of a loading range have come: a worker loads one at a time."""
    held = (each for each in record.ranges if state == each.state == "loading" and each.manifest == manifest)
    return next((f" {each.percent}%" for each in held), "")


def _lines(texts: list[str], most: int | None) -> str:
    if most is not None and len(texts) > most:
        texts = [*texts[:most], f"and {len(texts) - most} more"]
    return "\n".join(texts) or "-"
