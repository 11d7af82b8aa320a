"""Keys and redeemed challenges in both kinds of database: each challenge once, and limits that hold while spending."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import trio

from azu.accounts.challenge import RANDOM_BYTES, Site, make_challenge
from azu.accounts.keys import KEY_BYTES, ApiKey, new_key
from azu.accounts.message import SignInMessage
from azu.accounts.store import MAX_KEYS, KeyStore, key_limits
from azu.ledger import Ledger, Refusal, Reserved, Shortfall
from azu.payments.wallets import Wallet
from tests.ledger.books import FOREVER, opened
from tests.ledger.conftest import postgres, url

__all__ = ["postgres", "url"]

SITE = Site("azu.example.org", "https://azu.example.org", {"evm": "999"})
ALICE = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
NOW = int(time.time())


def challenge() -> SignInMessage:
    return make_challenge(b"s" * 32, SITE, Wallet("evm", ALICE), NOW, os.urandom(RANDOM_BYTES))


def key(limit: int | None = None, wallet: str = ALICE) -> ApiKey:
    fresh = new_key(os.urandom(KEY_BYTES))
    return ApiKey(fresh.key_id, fresh.digest, wallet, "n", ("inference", "keys"), limit, NOW, NOW + 1000)


def code(answer: object) -> str | None:
    return answer.code if isinstance(answer, Refusal) else None


async def test_a_challenge_is_redeemed_once(url: str) -> None:
    async with opened(url) as ledger, opened(url, owner="other") as other:
        message, keys = challenge(), [key() for _ in range(6)]
        answers: list[Refusal | None] = []

        async def redeem(store: KeyStore, mine: ApiKey) -> None:
            answers.append(await store.redeem(message, mine, NOW))

        async with trio.open_nursery() as nursery:
            for number, mine in enumerate(keys):
                nursery.start_soon(redeem, KeyStore(ledger if number % 2 else other), mine)
        assert [code(answer) for answer in answers if answer] == ["replayed_challenge"] * 5
        ((kept, spent),) = await KeyStore(ledger).of_wallet(ALICE)
        assert kept in keys
        assert spent == 0
        assert await KeyStore(other).find(kept.key_id) == kept
        # Asked again after the connection was lost behind the commit, it finds its own key.
        assert await KeyStore(ledger).redeem(message, kept, NOW) is None


async def test_a_wallet_has_so_many_good_keys_at_most(url: str) -> None:
    async with opened(url) as ledger:
        store = KeyStore(ledger)
        first = key()
        for mine in (first, *(key() for _ in range(MAX_KEYS - 1))):
            assert await store.redeem(challenge(), mine, NOW) is None
        assert code(await store.redeem(challenge(), key(), NOW)) == "too_many_keys"
        assert await store.redeem(challenge(), key(wallet="0xOther"), NOW) is None
        assert await store.revoke(ALICE, first.key_id, NOW)
        assert await store.redeem(challenge(), key(), NOW) is None


async def test_what_has_expired_is_forgotten_in_time(url: str) -> None:
    async with opened(url) as ledger:
        store = KeyStore(ledger)
        old = key()
        await store.redeem(challenge(), old, NOW)
        await store.redeem(challenge(), key(), old.expires_at + 89 * 86_400)
        assert await store.find(old.key_id) == old
        await store.redeem(challenge(), key(), old.expires_at + 91 * 86_400)
        assert await store.find(old.key_id) is None


async def test_a_key_is_revoked_by_its_wallet_alone_and_for_good(url: str) -> None:
    async with opened(url) as ledger:
        store, mine = KeyStore(ledger), key()
        await store.redeem(challenge(), mine, NOW)
        assert not await store.revoke("0xOther", mine.key_id, NOW)
        assert not await store.revoke(ALICE, "0" * 16, NOW)
        assert await store.find(mine.key_id) == mine
        assert await store.revoke(ALICE, mine.key_id, NOW + 1)
        assert await store.revoke(ALICE, mine.key_id, NOW + 2)
        assert await store.find(mine.key_id) == replace(mine, revoked_at=NOW + 1)


async def test_coordinators_share_the_secret(url: str) -> None:
    async with opened(url) as ledger, opened(url, owner="other") as other:
        secret = await KeyStore(ledger).secret()
        assert len(secret) == 32
        assert await KeyStore(other).secret() == secret


async def test_limits_hold_where_two_spend_at_once(url: str) -> None:
    async with opened(url, key_limits=key_limits) as ledger, opened(url, owner="other", key_limits=key_limits) as other:
        await ledger.deposit("hyperliquid", "eip155:999", "0x1", ALICE, 10**30)
        limited = key(10**20)  # beyond 64 bits
        await KeyStore(ledger).redeem(challenge(), limited, NOW)
        answers: list[Reserved | Refusal] = []

        async def reserve(book: Ledger, number: int) -> None:
            job = f"job{number}"
            answers.append(await book.reserve(job, ALICE, 4 * 10**19, limited.key_id, expires_at=FOREVER))

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(reserve, ledger if number % 2 else other, number)
        refused = [answer for answer in answers if isinstance(answer, Shortfall)]
        assert [(each.code, each.available) for each in refused] == [("key_limit", 2 * 10**19)] * 4
        ((_, spent),) = await KeyStore(ledger).of_wallet(ALICE)
        assert spent == 8 * 10**19


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("expected", ["revoked_api_key", "expired_api_key", "invalid_api_key"])
async def test_a_key_that_went_between_the_door_and_the_till(url: str, expected: str) -> None:
    async with opened(url, key_limits=key_limits) as ledger:
        store, mine = KeyStore(ledger), key()
        await ledger.deposit("hyperliquid", "eip155:999", "0x1", ALICE, 100)
        if expected == "expired_api_key":
            mine = replace(mine, expires_at=NOW - 1)
        if expected != "invalid_api_key":
            await store.redeem(challenge(), mine, NOW - 10)
        if expected == "revoked_api_key":
            await store.revoke(ALICE, mine.key_id, NOW)
        assert code(await ledger.reserve("job", ALICE, 5, mine.key_id, expires_at=FOREVER)) == expected
        assert await ledger.balance(f"client:{ALICE}") == 100
