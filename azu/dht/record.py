"""One record with all that it says, as a card for people and as a document for programs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from azu.dht.lookups import Found
from azu.dht.peers import held_states
from azu.dht.text import duration, is_relayed, link_text, printable, speed_text
from azu.records import CoordinatorRecord, WorkerRecord
from azu.sizes import format_size

__all__ = ["record_fields", "record_title", "records_document", "state_of"]

_CHECK_CLOCKS = "check both clocks (`timedatectl`, or `date -u`)"


def record_title(found: Found) -> str:
    """Whose record it is, and of which kind."""
    return f"{found.record.peer_id}  {found.kind}"


def record_fields(found: Found, now: float) -> dict[str, Text]:
    """Everything that the record says, at `now` (unix seconds)."""
    record = found.record
    own = _worker(record) if isinstance(record, WorkerRecord) else {}
    own = _coordinator(record) if isinstance(record, CoordinatorRecord) else own
    return {
        "key": Text(found.key),
        "state": Text(state_of(found, now), style="" if found.standing == "live" else "bold red"),
        "signed": Text(f"{_date(record.issued_at)}, by this peer; sequence number {record.sequence}"),
        "agent": Text(printable(record.agent) or "-"),
        **{name: Text(text) for name, text in own.items()},
        "addresses": Text(_lines([_address(each) for each in record.addrs])),
        "protocols": Text(", ".join(printable(each) for each in record.protocols) or "-"),
    }


def records_document(found: Sequence[Found], now: float) -> dict[str, Any]:
    """The records untouched, with whether they are in force at `now` (unix seconds)."""
    return {
        "records": [
            {
                "key": each.key,
                "kind": each.kind,
                "state": each.standing,
                "answers": each.answers,
                "age_s": round(now - each.record.issued_at, 1),
                "expires_in_s": round(each.record.expires_at - now, 1),
                **each.record.model_dump(mode="json"),
            }
            for each in found
        ]
    }


def state_of(found: Found, now: float) -> str:
    """Whether the record is in force, and if not, what that means and what to do."""
    record = found.record
    if found.standing == "live":
        left, age = duration(record.expires_at - now), duration(now - record.issued_at)
        return f"in force, {age} old, for {left} more"
    if found.standing == "early":
        return (
            f"dated {duration(record.issued_at - now)} in the future: the clock here is behind, or that peer's is "
            f"ahead; {_CHECK_CLOCKS}"
        )
    since = f"expired {duration(now - record.expires_at)} ago"
    if found.answers:
        return f"{since}, but the peer answers: the clock here is ahead, or that peer's is behind; {_CHECK_CLOCKS}"
    return f"{since}, and the peer does not answer: it is gone, or cut off"


def _worker(record: WorkerRecord) -> dict[str, str]:
    layers = [
        f"{manifest}: {held_states(record, manifest, None)}"
        for manifest in dict.fromkeys(held.manifest for held in record.ranges)
    ]
    return {
        "device": printable(record.device) or "-",
        "memory": f"{format_size(record.vram_free)} free of {format_size(record.vram_total)}",
        "weights": record.dtype,
        "kv cache": f"{record.kv_tokens} positions, {record.kv_tokens_free} for the next job to begin with",
        "speed": f"{record.layer_us / 1000:.2f} ms per token and layer" if record.layer_us else "not measured yet",
        "lately": speed_text(record.speed),
        "jobs": f"{record.jobs}; {record.waiting} of their steps wait{'; it is about to leave' * record.leaving}",
        "links": _lines([f"{link.peer_id}  {link_text(link)}" for link in record.links]),
        "layers": _lines(layers),
        "paid to": printable(record.payout_address) or "nobody: earnings are only counted",
    }


def _coordinator(record: CoordinatorRecord) -> dict[str, str]:
    offers = [
        f"{printable(offer.model_id)}: {offer.n_layers} layers, manifest {offer.manifest}" for offer in record.models
    ]
    return {"models": _lines(offers)}


def _address(address: str) -> str:
    return f"{printable(address)}{' (relayed)' if is_relayed(address) else ''}"


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a peer's number, which may be past the year 9999
        return f"at unix second {seconds}"


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(texts) or "-"
