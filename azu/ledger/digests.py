"""The digest of a transaction, which covers the one before: what was written cannot change unseen. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

__all__ = ["GENESIS", "digest_of"]

GENESIS = bytes(32)


def digest_of(before: bytes, seq: int, key: str, kind: str, at: int, postings: Iterable[tuple[str, int]]) -> bytes:
    """SHA-256 over the digest before and the transaction as JSON, amounts as decimal text."""
    content = [seq, key, kind, at, [[account, str(amount)] for account, amount in postings]]
    return hashlib.sha256(before + json.dumps(content, separators=(",", ":")).encode()).digest()
