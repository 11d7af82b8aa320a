"""API keys and redeemed challenges, in the ledger's database.

A key's limit is read in the transaction that spends (`key_limits`), so that what is revoked or used up by one
coordinator is so for all that share the database.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update

from azu.accounts.keys import SCOPES, ApiKey
from azu.accounts.message import SignInMessage
from azu.ledger import KeyLimit, Ledger, schema
from azu.tickets import Refusal

__all__ = ["MAX_KEYS", "KeyStore", "key_limits"]

MAX_KEYS = 64  # of one wallet, that are good
_EXPIRED_KEPT_S = 90 * 86_400  # so long their owner may still see them in a list
_MAX_LISTED = 1_000
_SECRET_BYTES = 32


class KeyStore:
    """The keys of all wallets; one for the app. Raises InternalError where the database cannot be used."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._secret: bytes | None = None

    async def secret(self) -> bytes:
        """What challenges are made with; the same for all coordinators that share the database."""
        if self._secret is None:
            self._secret = await self._ledger.write(_secret)
        return self._secret

    async def find(self, key_id: str) -> ApiKey | None:
        """What is kept under a key's id."""

        def work(connection: Connection) -> ApiKey | None:
            row = connection.execute(select(schema.api_keys).filter_by(key_id=key_id)).mappings().one_or_none()
            return None if row is None else _key_of(row)

        return await self._ledger.read(work)

    async def redeem(self, message: SignInMessage, key: ApiKey, now: int) -> Refusal | None:
        """Give out a key for a challenge that was signed, and which is worth nothing from then on.

        Returns:
            Why not: code "replayed_challenge" or "too_many_keys".
        """
        return await self._ledger.write(lambda connection: _redeem(connection, message, key, now))

    async def of_wallet(self, wallet: str) -> Sequence[tuple[ApiKey, int]]:
        """A wallet's keys, the newest first, with what each has spent or put aside."""

        def work(connection: Connection) -> Sequence[tuple[ApiKey, int]]:
            keys, spending = schema.api_keys, schema.key_spending
            query = (
                select(keys, spending.c.spent)
                .outerjoin(spending, keys.c.key_id == spending.c.key_id)
                .where(keys.c.wallet == wallet)
                .order_by(keys.c.created_at.desc(), keys.c.key_id)
                .limit(_MAX_LISTED)
            )
            return [(_key_of(row), row["spent"] or 0) for row in connection.execute(query).mappings()]

        return await self._ledger.read(work)

    async def revoke(self, wallet: str, key_id: str, now: int) -> bool:
        """End a key of the wallet; False where it has no such key. One that is revoked stays so since when it was."""

        def work(connection: Connection) -> bool:
            keys = schema.api_keys
            own = (keys.c.key_id == key_id, keys.c.wallet == wallet)
            connection.execute(update(keys).where(*own, keys.c.revoked_at.is_(None)).values(revoked_at=now))
            return connection.execute(select(keys.c.key_id).where(*own)).first() is not None

        return await self._ledger.write(work)


def key_limits(connection: Connection, key_ids: Collection[str]) -> Mapping[str, KeyLimit]:
    """What these keys may spend in all; a refusal where one may not spend any more. For `Ledger`."""
    keys = schema.api_keys
    rows = connection.execute(select(keys).where(keys.c.key_id.in_(key_ids))).mappings()
    found = {row["key_id"]: _limit(_key_of(row), time.time()) for row in rows}
    gone = Refusal("invalid_api_key", "this API key is not known here", "Make a new one with POST /auth/keys.")
    return {key_id: found.get(key_id, gone) for key_id in key_ids}


def _limit(key: ApiKey, now: float) -> KeyLimit:
    if key.revoked_at is not None:
        return Refusal("revoked_api_key", "this API key was revoked", "Make a new one with POST /auth/keys.")
    if now >= key.expires_at:
        return Refusal("expired_api_key", "this API key has expired", "Make a new one with POST /auth/keys.")
    return key.spending_limit


def _secret(connection: Connection) -> bytes:
    _lock(connection)
    known = connection.execute(select(schema.sign_in.c.secret)).scalar_one_or_none()
    if known is None:
        known = os.urandom(_SECRET_BYTES)
        connection.execute(insert(schema.sign_in), {"id": 1, "secret": known})
    return bytes(known)


def _redeem(connection: Connection, message: SignInMessage, key: ApiKey, now: int) -> Refusal | None:
    _lock(connection)
    keys, challenges = schema.api_keys, schema.challenges
    connection.execute(delete(challenges).where(challenges.c.expires_at < now))
    connection.execute(delete(keys).where(keys.c.expires_at < now - _EXPIRED_KEPT_S))
    used_for = connection.execute(select(challenges.c.key_id).filter_by(nonce=message.nonce)).scalar_one_or_none()
    if used_for == key.key_id:  # committed, and the connection lost before that was known
        return None
    if used_for is not None:
        remedy = "Ask POST /auth/challenge for another: each makes one key."
        return Refusal("replayed_challenge", "this signed message was used before", remedy)
    good = (keys.c.wallet == key.wallet, keys.c.revoked_at.is_(None), keys.c.expires_at > now)
    if connection.execute(select(func.count()).select_from(keys).where(*good)).scalar_one() >= MAX_KEYS:
        remedy = "Revoke one with DELETE /auth/keys/<id>."
        return Refusal("too_many_keys", f"the wallet has {MAX_KEYS} keys already", remedy)
    used = {"nonce": message.nonce, "key_id": key.key_id, "expires_at": message.expires_at}
    connection.execute(insert(challenges), used)
    connection.execute(insert(keys), _row_of(key))
    return None


def _lock(connection: Connection) -> None:
    """Take turns with whoever else writes, as the ledger does."""
    connection.execute(select(schema.head.c.id).with_for_update())


def _row_of(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "digest": key.digest,
        "wallet": key.wallet,
        "name": key.name,
        "scopes": " ".join(key.scopes),
        "spending_limit": key.spending_limit,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _key_of(row: RowMapping) -> ApiKey:
    columns = {column.name: row[column.name] for column in schema.api_keys.columns}
    given = columns.pop("scopes").split()
    return ApiKey(**columns, scopes=tuple(scope for scope in SCOPES if scope in given))
