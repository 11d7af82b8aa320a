"""Signing in with a wallet: what makes a key, what does not, and what a key may."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import select

from azu.accounts.message import parse_message
from azu.accounts.store import MAX_KEYS
from azu.ledger import schema
from tests.coordinator.api.paying import ALICE, BOB, Bank, SolanaWallet, open_bank
from tests.coordinator.api.twin import Twin

CAROL = SolanaWallet(3)


@pytest.fixture
async def bank(twin: Twin, tmp_path: Path, empty_ledger: Path) -> AsyncIterator[Bank]:
    async with open_bank(twin, tmp_path, empty_ledger) as made:
        yield made


def error_of(response: Any) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert len(error["message"]) > 20
    return response.status_code, error["code"]


async def test_a_wallet_gets_a_key_that_works(bank: Bank) -> None:
    before = int(time.time())
    message = parse_message(await bank.challenge())
    assert (message.domain, message.uri) == (bank.url.removeprefix("http://"), bank.url)
    assert (message.chain, message.chain_id, message.address) == ("Ethereum", "999", ALICE.address)
    assert before <= message.issued_at <= message.expires_at - 600 <= int(time.time())
    key = await bank.key(name="laptop", scopes=["keys", "account"], spending_limit="5", expires_in_s=3600)
    listed = (await bank.send("GET", "/auth/keys", key=key)).json()
    (entry,) = listed["data"]
    assert entry | {"created_at": 0, "expires_at": 0} == {
        "object": "api_key",
        "id": key.split("-")[1],
        "wallet": ALICE.address,
        "name": "laptop",
        "scopes": ["account", "keys"],
        "spending_limit": 5,
        "spent": 0,
        "created_at": 0,
        "expires_at": 0,
        "revoked_at": None,
    }
    assert entry["expires_at"] - entry["created_at"] == 3600


async def test_the_key_itself_is_kept_nowhere(bank: Bank, tmp_path: Path) -> None:
    key = await bank.key()
    secret = key.split("-", 2)[2].encode()
    rows = await bank.ledger.read(lambda connection: connection.execute(select(schema.api_keys)).all())
    assert len(rows) == 1
    files = [file for file in tmp_path.iterdir() if file.is_file()]  # noqa: ASYNC240 - a few small ones
    assert len(files) >= 2
    assert all(secret not in file.read_bytes() for file in files)


async def test_a_signed_message_makes_one_key_only(bank: Bank) -> None:
    message = await bank.challenge()
    signed = {"message": message, "signature": ALICE.sign(message)}
    answers: list[Any] = []

    async def make() -> None:
        answers.append(await bank.send("POST", "/auth/keys", json=signed))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(make)
    assert sorted(answer.status_code for answer in answers) == [201, 401, 401, 401]
    assert error_of(await bank.send("POST", "/auth/keys", json=signed)) == (401, "replayed_challenge")


async def test_what_does_not_make_a_key(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    message = await bank.challenge()

    async def code(text: str, signature: str) -> tuple[int, str]:
        return error_of(await bank.send("POST", "/auth/keys", json={"message": text, "signature": signature}))

    domain = bank.url.removeprefix("http://")
    elsewhere = message.replace(domain, "evil.example", 1)
    other_chain = message.replace("Chain ID: 999", "Chain ID: 1")
    longer = message.replace("Expiration Time: 2", "Expiration Time: 3")
    assert await code(elsewhere, ALICE.sign(elsewhere)) == (401, "wrong_domain")
    assert await code(other_chain, ALICE.sign(other_chain)) == (401, "wrong_chain")
    assert await code(longer, ALICE.sign(longer)) == (401, "unknown_challenge")
    assert await code(message, BOB.sign(message)) == (401, "bad_signature")
    assert await code(message, "0x00") == (401, "bad_signature")
    assert await code(message, ALICE.sign(message + " ")) == (401, "bad_signature")
    assert await code(message + "\n", ALICE.sign(message + "\n")) == (400, "bad_message")
    assert await code("Hello", ALICE.sign("Hello")) == (400, "bad_message")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 601)
    assert await code(message, ALICE.sign(message)) == (401, "expired_challenge")
    rows = await bank.ledger.read(lambda connection: connection.execute(select(schema.api_keys)).all())
    assert rows == []


BAD_BODIES: list[tuple[str, dict[str, Any], str]] = [
    ("/auth/challenge", {}, "missing_required_parameter"),
    ("/auth/challenge", {"address": "0x12"}, "bad_address"),
    ("/auth/challenge", {"address": 5}, "invalid_type"),
    ("/auth/challenge", {"address": CAROL.address}, "wrong_chain"),
    ("/auth/challenge", {"address": ALICE.address, "domain": "x"}, "unknown_parameter"),
    ("/auth/keys", {"message": "x"}, "missing_required_parameter"),
    ("/auth/keys", {"message": "x", "signature": "0" * 133}, "invalid_value"),
    ("/auth/keys", {"message": "x", "signature": "0", "scopes": ["root"]}, "invalid_value"),
    ("/auth/keys", {"message": "x", "signature": "0", "scopes": []}, "invalid_value"),
    ("/auth/keys", {"message": "x", "signature": "0", "spending_limit": -1}, "invalid_value"),
    ("/auth/keys", {"message": "x", "signature": "0", "spending_limit": 1.5}, "invalid_type"),
    ("/auth/keys", {"message": "x", "signature": "0", "spending_limit": "1e3"}, "invalid_type"),
    ("/auth/keys", {"message": "x", "signature": "0", "spending_limit": 2**128}, "invalid_value"),
    ("/auth/keys", {"message": "x", "signature": "0", "expires_in_s": 10**9}, "invalid_value"),
]


async def test_bad_bodies(bank: Bank) -> None:
    for path, body, code in BAD_BODIES:
        assert error_of(await bank.send("POST", path, json=body)) == (400, code), body


async def test_revoked_and_expired_keys_end_at_once(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, other = await bank.key(scopes=["keys"]), await bank.key(expires_in_s=60)
    assert (await bank.send("GET", "/balance", key=other)).status_code == 200
    assert error_of(await bank.send("GET", "/balance", key=manager)) == (403, "missing_scope")
    assert error_of(await bank.send("DELETE", f"/auth/keys/{other.split('-')[1]}", key=other)) == (403, "missing_scope")
    stranger = await bank.key(BOB, scopes=["keys"])
    assert error_of(await bank.send("DELETE", f"/auth/keys/{other.split('-')[1]}", key=stranger)) == (
        404,
        "key_not_found",
    )
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 61)
    assert error_of(await bank.send("GET", "/balance", key=other)) == (401, "expired_api_key")
    monkeypatch.undo()
    for _ in range(2):
        done = await bank.send("DELETE", f"/auth/keys/{other.split('-')[1]}", key=manager)
        assert (done.status_code, done.json()["deleted"]) == (200, True)
    assert error_of(await bank.send("GET", "/balance", key=other)) == (401, "revoked_api_key")
    listed = (await bank.send("GET", "/auth/keys", key=manager)).json()["data"]
    assert [entry["revoked_at"] is None for entry in listed if entry["id"] == other.split("-")[1]] == [False]


NO_KEYS: list[tuple[str | None, str]] = [
    (None, "missing_api_key"),
    ("Basic YWJj", "missing_api_key"),
    ("Bearer", "missing_api_key"),
    ("Bearer none", "invalid_api_key"),
    (f"Bearer {ALICE.address}", "invalid_api_key"),
    (f"Bearer azu-{'0' * 16}-{'A' * 43}", "invalid_api_key"),
    (f"Bearer {'x' * 5000}", "invalid_api_key"),
]
KEYED = ["/balance", "/usage", "/v1/models", "/v1/models/x", "/results/x", "/auth/keys"]
KEYED_POSTS = ["/v1/chat/completions", "/v1/pricing", "/submit"]


@pytest.mark.parametrize(("header", "code"), NO_KEYS)
async def test_without_a_key(bank: Bank, header: str | None, code: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in (*KEYED, *KEYED_POSTS):
        is_post = path in KEYED_POSTS
        response = await bank.send("POST" if is_post else "GET", path, headers=headers, json={} if is_post else None)
        assert error_of(response) == (401, code), path
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert bank.twin.requests == []


async def test_what_needs_no_key(bank: Bank) -> None:
    for path in ("/v1/pricing", "/healthz"):
        assert (await bank.send("GET", path)).status_code == 200


async def test_a_wallet_has_so_many_keys_at_most(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.accounts.store.MAX_KEYS", 2)
    assert MAX_KEYS > 2
    await bank.key()
    await bank.key()
    message = await bank.challenge()
    signed = {"message": message, "signature": ALICE.sign(message)}
    assert error_of(await bank.send("POST", "/auth/keys", json=signed)) == (409, "too_many_keys")


async def test_challenges_are_given_out_at_a_pace(
    twin: Twin, tmp_path: Path, empty_ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.api.sign_in._BURST", 3)
    monkeypatch.setattr("coordinator.api.sign_in._PER_S", 0.001)
    async with open_bank(twin, tmp_path, empty_ledger) as bank:
        for _ in range(3):
            await bank.challenge()
        late = await bank.send("POST", "/auth/challenge", json={"address": BOB.address})
        assert error_of(late) == (429, "rate_limit_exceeded")
        assert 900 < int(late.headers["Retry-After"]) <= 1000
        rows = await bank.ledger.read(lambda connection: connection.execute(select(schema.challenges)).all())
        assert rows == [], "asking leaves nothing behind"


async def test_signing_in_with_solana(twin: Twin, tmp_path: Path, empty_ledger: Path) -> None:
    async with open_bank(twin, tmp_path, empty_ledger, name="solana") as bank:
        message = parse_message(await bank.challenge(CAROL))
        assert (message.chain, message.address) == ("Solana", CAROL.address)
        assert message.chain_id == "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp"
        key = await bank.key(CAROL)
        assert (await bank.send("GET", "/balance", key=key)).json()["wallet"] == CAROL.address


async def test_coordinators_of_one_database_redeem_each_others(twin: Twin, tmp_path: Path, empty_ledger: Path) -> None:
    options = {"public_url": "https://azu.example.org"}
    async with open_bank(twin, tmp_path, empty_ledger, **options) as first:
        message = await first.challenge()
        assert parse_message(message).domain == "azu.example.org"
        async with open_bank(twin, tmp_path, empty_ledger, is_new=False, **options) as second:
            signed = {"message": message, "signature": ALICE.sign(message)}
            key = (await second.send("POST", "/auth/keys", json=signed)).json()["key"]
            assert error_of(await first.send("POST", "/auth/keys", json=signed)) == (401, "replayed_challenge")
            assert (await first.send("GET", "/balance", key=key)).status_code == 200
