"""Providers, addresses and pings as rows and lines for people, and as documents for programs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from azu.dht.lookups import Address, Found, Pings, Provider
from azu.dht.peers import held_states
from azu.dht.screen import Row
from azu.dht.snapshot import Pong
from azu.dht.text import duration, is_relayed, milliseconds, printable, short_address, short_ids
from azu.records import CoordinatorRecord, WorkerRecord

__all__ = [
    "address_rows",
    "addresses_document",
    "ping_line",
    "ping_summary",
    "pings_document",
    "provider_rows",
    "providers_document",
]

_MOST_SPANS = 12


def provider_rows(providers: Sequence[Provider], digest: str, now: float, *, wide: bool) -> list[Row]:
    """One row a provider and kind of record: coordinators, then workers in the order of the layers that they have.

    Who has no record gets a row all the same.
    """
    ids = short_ids(each.peer_id for each in providers)
    holdings = [(provider, found) for provider in providers for found in provider.records or (None,)]
    return [
        {
            "PEER": provider.peer_id if wide else ids[provider.peer_id],
            "KIND": "-" if found is None else found.kind,
            "LAYERS": _layers(found, digest, now, wide),
            "AGE": "-" if found is None else duration(now - found.record.issued_at),
            "ADDRESSES": _addresses(provider, wide),
        }
        for provider, found in sorted(holdings, key=lambda each: _order(each[0], each[1], digest))
    ]


def providers_document(providers: Sequence[Provider], digest: str) -> dict[str, Any]:
    """Who announced a manifest, and what each says to hold of it; ranges are [start, end)."""
    return {
        "manifest": digest,
        "providers": [
            {
                "peer_id": provider.peer_id,
                "addrs": list(provider.addresses),
                "records": [_holding(found, digest) for found in provider.records],
            }
            for provider in providers
        ],
    }


def address_rows(addresses: Sequence[Address]) -> list[Row]:
    """One row an address."""
    return [
        {
            "ADDRESS": printable(each.text),
            "PATH": _path(each.text),
            "KNOWN FROM": " and ".join(_sources(each)),
        }
        for each in addresses
    ]


def addresses_document(peer_id: str, addresses: Sequence[Address]) -> dict[str, Any]:
    """Where a peer can be dialled."""
    return {
        "peer_id": peer_id,
        "addresses": [
            {"address": each.text, "path": _path(each.text), "in_record": each.in_record, "in_network": each.in_network}
            for each in addresses
        ],
    }


def ping_line(number: int, pong: Pong | None) -> str:
    """One ping."""
    return f"{number:>3}  {'no answer' if pong is None else f'{milliseconds(pong.rtt)}  {pong.route}'}"


def ping_summary(pings: Pings) -> str:
    """All pings together."""
    rtts = [each.rtt for each in pings.pongs if each is not None]
    lost = len(pings.pongs) - len(rtts)
    parts = [f"{len(pings.pongs)} {'ping' if len(pings.pongs) == 1 else 'pings'}, {lost} lost"]
    if rtts:
        mean = sum(rtts) / len(rtts)
        parts.append(
            f"{milliseconds(min(rtts))} at least, {milliseconds(mean)} mean, {milliseconds(max(rtts))} at most"
        )
    seconds = pings.connect_seconds
    parts.append("connected since joining" if seconds is None else f"found and connected in {milliseconds(seconds)}")
    return "; ".join(parts)


def pings_document(pings: Pings) -> dict[str, Any]:
    """All pings; what was lost is null."""
    return {
        "peer_id": pings.peer_id,
        "connect_ms": None if pings.connect_seconds is None else round(pings.connect_seconds * 1000, 2),
        "pings": [
            None if each is None else {"rtt_ms": round(each.rtt * 1000, 2), "path": each.route} for each in pings.pongs
        ],
    }


def _order(provider: Provider, found: Found | None, digest: str) -> tuple[int, int, str]:
    record = None if found is None else found.record
    if isinstance(record, WorkerRecord) and found is not None and found.standing == "live":
        return 1, min((each.start for each in record.ranges if each.manifest == digest), default=0), provider.peer_id
    return 0 if isinstance(record, CoordinatorRecord) else 2, 0, provider.peer_id


def _layers(found: Found | None, digest: str, now: float, wide: bool) -> str:
    if found is None:
        return "no record: just started, or gone"
    if found.standing != "live":
        expired = f"record expired {duration(now - found.record.expires_at)} ago"
        return expired if found.standing == "expired" else "record dated in the future"
    if isinstance(found.record, WorkerRecord):
        return held_states(found.record, digest, None if wide else _MOST_SPANS)
    offers = found.record.models if isinstance(found.record, CoordinatorRecord) else ()
    return next((f"{offer.n_layers} offered" for offer in offers if offer.manifest == digest), "nothing")


def _addresses(provider: Provider, wide: bool) -> str:
    shown = [short_address(each, provider.peer_id, wide=wide) for each in provider.addresses]
    if len(shown) > 1 and not wide:
        shown = [shown[0], f"and {len(shown) - 1} more"]
    return "\n".join(shown) or "-"


def _holding(found: Found, digest: str) -> dict[str, Any]:
    record = found.record
    ranges = record.ranges if isinstance(record, WorkerRecord) else ()
    offers = record.models if isinstance(record, CoordinatorRecord) else ()
    return {
        "kind": found.kind,
        "state": found.standing,
        "ranges": [each.model_dump(mode="json") for each in ranges if each.manifest == digest],
        "offers": [each.model_dump(mode="json") for each in offers if each.manifest == digest],
    }


def _path(address: str) -> str:
    return "relayed" if is_relayed(address) else "direct"


def _sources(address: Address) -> list[str]:
    sources = {"its record": address.in_record, "other peers": address.in_network}
    return [name for name, holds in sources.items() if holds]
