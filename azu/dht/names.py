"""What an operator types to name a peer, a record or a model, as short as azu-dht itself shows it. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import base58

from azu.dht.kinds import KINDS
from azu.dht.text import printable
from azu.errors import InputError
from azu.records import CoordinatorRecord

__all__ = ["as_digest", "is_peer_id", "is_whole", "match_model", "match_peer", "raw_key", "split_key"]

_PEER_ID = re.compile(r"(?:12D3KooW|Qm)[1-9A-HJ-NP-Za-km-z]{44}")
_ENDING = re.compile(r"(?:…|\.\.\.)?([1-9A-HJ-NP-Za-km-z]{4,51})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BEGINNING = re.compile(r"[0-9a-f]{6,63}")
_SHA256_MULTIHASH = b"\x12\x20"  # sha2-256, 32 bytes
_MOST_NAMED = 5


def is_peer_id(text: str) -> bool:
    """Whether this is a whole peer id."""
    return _PEER_ID.fullmatch(text) is not None


def as_digest(text: str) -> str | None:
    """The digest, if this is a whole one: 64 hex digits."""
    return text.lower() if _DIGEST.fullmatch(text.lower()) else None


def match_peer(text: str, known: Collection[str]) -> str:
    """The one of the known peers whose id ends in this, as the tables show it.

    Raises:
        InputError: there is none or several, or it cannot be a peer id's ending.
    """
    ending = _ENDING.fullmatch(text)
    if ending is None:
        raise InputError(
            f"{text[:80]!r} is not a peer id",
            code="bad_peer_id",
            remedy="Give it whole (52 characters that begin with 12D3KooW), or its ending as `azu-dht peers` shows it",
        )
    found = sorted(each for each in known if each.endswith(ending[1]))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"none of the {len(known)} peers that are announced here has an id that ends in {ending[1]}",
            code="unknown_peer",
            remedy="Look at `azu-dht peers`, or give the whole peer id",
        )
    raise InputError(
        f"{len(found)} peers have ids that end in {ending[1]}: {_listed(found)}",
        code="ambiguous_peer",
        remedy="Give more of its end, or the whole peer id",
    )


def split_key(text: str) -> tuple[str, str]:
    """Namespace and peer of a record's key such as /azu-worker/12D3KooW...; the peer may be an ending.

    Raises:
        InputError: it is no such key.
    """
    namespaces = [kind.namespace for kind in KINDS]
    empty, namespace, peer = [*text.split("/", 2), "", ""][:3]
    if empty or namespace not in namespaces or not peer:
        raise InputError(
            f"{printable(text[:120])!r} is not the key of a record",
            code="bad_record_key",
            remedy=f"Give a peer id, or a key such as {' or '.join(f'/{each}/<peer id>' for each in namespaces)}",
        )
    return namespace, peer


def is_whole(text: str) -> bool:
    """Whether this is a record's key, a digest, or a peer id, in which nothing is left out."""
    return as_digest(text) is not None or is_peer_id(split_key(text)[1] if text.startswith("/") else text)


def raw_key(whole: str) -> bytes:
    """What the DHT is asked for: a record's key as it is, a digest as a multihash, or a peer id's bytes."""
    if whole.startswith("/"):
        return whole.encode()
    digest = as_digest(whole)
    return base58.b58decode(whole) if digest is None else _SHA256_MULTIHASH + bytes.fromhex(digest)


def match_model(text: str, offers: Iterable[CoordinatorRecord]) -> str:
    """The manifest's digest that a coordinator's model id, or the beginning of a digest, stands for.

    Raises:
        InputError: no coordinator offers it, or several models fit.
    """
    models = {(offer.model_id, offer.manifest) for record in offers for offer in record.models}
    beginning = _BEGINNING.fullmatch(text.lower())
    found = {manifest for model_id, manifest in models if model_id == text}
    if not found and beginning is not None:
        found = {manifest for _, manifest in models if manifest.startswith(beginning[0])}
    if len(found) == 1:
        return found.pop()
    shown = printable(text[:120])
    if not found:
        offered = _listed(sorted({printable(model_id) for model_id, _ in models}))
        raise InputError(
            f"no coordinator here offers {shown!r}",
            code="unknown_model",
            remedy=f"Give one of the models offered ({offered}), or all 64 hex digits of a manifest's digest"
            if models
            else "No coordinator offers any model here; give all 64 hex digits of a manifest's digest",
        )
    raise InputError(
        f"{shown!r} stands for {len(found)} manifests: {_listed(sorted(found))}",
        code="ambiguous_model",
        remedy="Give one of these digests",
    )


def _listed(texts: list[str]) -> str:
    more = len(texts) - _MOST_NAMED
    return ", ".join(texts[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
