"""API keys: what is kept cannot be used, what is shown works, and only within its scopes and time."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.accounts.keys import KEY_BYTES, SCOPES, ApiKey, NewKey, check_key, key_id_of, new_key
from azu.tickets import Refusal

NOW = 1_000
FRESH = new_key(bytes(range(KEY_BYTES)))


def kept(fresh: NewKey = FRESH) -> ApiKey:
    return ApiKey(
        key_id=fresh.key_id,
        digest=fresh.digest,
        wallet="0xWallet",
        name="",
        scopes=("inference", "account"),
        spending_limit=None,
        created_at=NOW,
        expires_at=NOW + 100,
    )


def code(answer: ApiKey | Refusal) -> str:
    return answer.code if isinstance(answer, Refusal) else "let in"


def test_a_key_is_let_in() -> None:
    assert check_key(FRESH.token, kept(), "inference", NOW) == kept()
    assert check_key(FRESH.token, kept(), None, NOW) == kept()
    assert FRESH.token.startswith("azu-")
    assert key_id_of(FRESH.token) == FRESH.key_id


def test_what_is_kept_is_a_hash_of_the_secret() -> None:
    secret = FRESH.token.removeprefix(f"azu-{FRESH.key_id}-")
    assert kept().digest == hashlib.sha256(secret.encode()).digest()
    assert secret not in repr(kept())


@pytest.mark.parametrize(
    ("key", "scope", "now", "expected"),
    [
        (kept(), "keys", NOW, "missing_scope"),
        (kept(), "account", NOW + 100, "expired_api_key"),
        (replace(kept(), revoked_at=NOW), "account", NOW, "revoked_api_key"),
        (None, "account", NOW, "invalid_api_key"),
        (replace(kept(), digest=bytes(32)), "account", NOW, "invalid_api_key"),
    ],
)
def test_refusals(key: ApiKey | None, scope: str, now: int, expected: str) -> None:
    assert scope in SCOPES
    assert code(check_key(FRESH.token, key, scope, now)) == expected


def test_who_has_only_the_id_learns_nothing_of_the_key() -> None:
    other = new_key(bytes.fromhex(FRESH.key_id) + os.urandom(32))
    revoked = replace(kept(), revoked_at=NOW)
    assert check_key(other.token, revoked, "account", NOW) == check_key(other.token, None, "account", NOW)


@given(st.integers(0, 84), st.characters())
def test_a_changed_token_is_not_let_in(place: int, character: str) -> None:
    token = FRESH.token[:place] + character + FRESH.token[place + 1 :]
    if token != FRESH.token and key_id_of(token) == FRESH.key_id:
        assert code(check_key(token, kept(), "account", NOW)) == "invalid_api_key"


@given(st.text())
def test_any_text_is_no_key(text: str) -> None:
    assert key_id_of(text) is None
    assert code(check_key(text, kept(), "account", NOW)) == "invalid_api_key"


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_every_key_can_be_told_apart(random: bytes) -> None:
    fresh = new_key(random)
    assert key_id_of(fresh.token) == fresh.key_id
    assert code(check_key(fresh.token, kept(fresh), "account", NOW)) == "let in"
