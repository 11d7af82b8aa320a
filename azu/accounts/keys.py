"""API keys: `azu-<id>-<secret>`, of which only the secret's hash is kept.

The secret is 256 random bits, so a plain SHA-256 is enough: there is nothing to guess that a slow hash would slow down.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

from azu.tickets import Refusal

__all__ = ["KEY_BYTES", "SCOPES", "ApiKey", "NewKey", "Scope", "check_key", "key_id_of", "new_key"]

Scope = Literal["inference", "account", "keys"]
# inference: answers, which cost. account: what was paid and used. keys: see and revoke the wallet's keys.
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

_ID_BYTES, _SECRET_BYTES = 8, 32
KEY_BYTES = _ID_BYTES + _SECRET_BYTES
_TOKEN: Final = re.compile(r"azu-([0-9a-f]{16})-([A-Za-z0-9_-]{43})", re.ASCII)
_NO_KEY = Refusal(
    "invalid_api_key",
    "this API key is not known here",
    "Check it; a new one is made with POST /auth/challenge and POST /auth/keys.",
)


class NewKey(NamedTuple):
    """A fresh key: `token` is for its owner, once, and `digest` is what is kept."""

    key_id: str
    token: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key; times are unix seconds, amounts the chain's smallest unit.

    Args:
        spending_limit: over the key's whole life; None where only the wallet's balance limits it.
    """

    key_id: str
    digest: bytes
    wallet: str
    name: str
    scopes: tuple[Scope, ...]
    spending_limit: int | None
    created_at: int
    expires_at: int
    revoked_at: int | None = None


def new_key(random: bytes) -> NewKey:
    """A key of KEY_BYTES random bytes."""
    key_id, secret = random[:_ID_BYTES].hex(), base64.urlsafe_b64encode(random[_ID_BYTES:]).rstrip(b"=").decode()
    return NewKey(key_id, f"azu-{key_id}-{secret}", _digest(secret))


def key_id_of(token: str) -> str | None:
    """The id in a token, which is no secret; None where it is no key of azu's."""
    found = _TOKEN.fullmatch(token)
    return found and found[1]


def check_key(token: str, key: ApiKey | None, needed: Scope | None, now: int) -> ApiKey | Refusal:
    """The key, where the token is its own and may do what needs that scope.

    Takes as long for unknown keys as for known ones.

    Args:
        key: what is kept under the token's id.
    """
    found = _TOKEN.fullmatch(token)
    digest = _digest(found[2] if found else "")
    if not hmac.compare_digest(digest, key.digest if key else bytes(len(digest))) or key is None:
        return _NO_KEY
    # From here on who asks has the secret, and may know what became of the key.
    if key.revoked_at is not None:
        return Refusal("revoked_api_key", "this API key was revoked", _NO_KEY.remedy)
    if now >= key.expires_at:
        return Refusal("expired_api_key", "this API key has expired", _NO_KEY.remedy)
    if needed is not None and needed not in key.scopes:
        problem = f"this API key has the scopes {', '.join(key.scopes)}, and this needs {needed}"
        return Refusal("missing_scope", problem, "Make a key with that scope with POST /auth/keys.")
    return key


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
