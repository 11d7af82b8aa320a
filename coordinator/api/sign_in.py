"""POST /auth/challenge, and POST, GET and DELETE /auth/keys: a wallet signs, and gets keys."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import trio
from pydantic import Field
from quart import Request

from azu.accounts.challenge import CHAIN_NAMES, RANDOM_BYTES, Site, check_challenge, make_challenge
from azu.accounts.keys import KEY_BYTES, ApiKey, Scope, new_key
from azu.accounts.message import MAX_MESSAGE_CHARS, SignInMessage, parse_message
from azu.accounts.rate import RateLimit
from azu.accounts.store import KeyStore
from azu.payments.wallets import MAX_SIGNATURE_CHARS, Wallet, has_signed, parse_wallet
from azu.tickets import Refusal
from coordinator.api.amounts import AmountIn, amount_out
from coordinator.api.auth import Caller, address_of
from coordinator.api.bodies import Bodies
from coordinator.api.errors import ApiError, too_often
from coordinator.api.requests import Strict, parse_body
from coordinator.api.settings import ApiSettings

__all__ = ["SignIn", "key_object"]

B = TypeVar("B", bound=Strict)

_MAX_BODY_BYTES = 16_384
_DAY_S = 86_400
# Nobody signs in more often by hand; a program keeps its key.
_BURST, _PER_S = 30, 1.0
_CHECKED_AT_ONCE = 1  # signatures; a millisecond each


class ChallengeRequest(Strict):
    """Who wants to sign in."""

    address: Annotated[str, Field(max_length=64)]


class KeyRequest(Strict):
    """A signed challenge, and what the key shall be."""

    message: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)]
    signature: Annotated[str, Field(max_length=MAX_SIGNATURE_CHARS)]
    name: Annotated[str, Field(max_length=64)] = ""
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)] = ["inference", "account"]  # noqa: RUF012
    spending_limit: AmountIn | None = None
    expires_in_s: Annotated[int, Field(ge=60, le=366 * _DAY_S)] = 90 * _DAY_S


class SignIn:
    """What the routes do; one for the app.

    Args:
        site: who this coordinator is to clients; its address is known once it listens.
    """

    def __init__(self, keys: KeyStore, site: Callable[[], Site]) -> None:
        self._keys = keys
        self._site = site
        self._bodies = Bodies(replace(ApiSettings(), max_body_bytes=_MAX_BODY_BYTES))
        self._rate = RateLimit(burst=_BURST, per_s=_PER_S)
        self._limiter = trio.CapacityLimiter(_CHECKED_AT_ONCE)

    async def challenge(self, request: Request) -> dict[str, Any]:
        """A text for a wallet to sign.

        Raises:
            ApiError: no address, or one of another chain (400); asked too often (429).
        """
        asked = await self._body(request, ChallengeRequest)
        wallet = self._wallet(asked.address)
        secret = await self._keys.secret()
        message = make_challenge(secret, self._site(), wallet, int(time.time()), secrets.token_bytes(RANDOM_BYTES))
        return {
            "object": "challenge",
            "address": wallet.address,
            "message": message.text(),
            "nonce": message.nonce,
            "domain": message.domain,
            "uri": message.uri,
            "chain_id": message.chain_id,
            "issued_at": message.issued_at,
            "expires_at": message.expires_at,
        }

    async def make_key(self, request: Request) -> dict[str, Any]:
        """A key for who signed; its token is in this answer and nowhere else.

        Raises:
            ApiError: status 401 where the signed challenge does not hold, 409 where the wallet has too many keys.
        """
        asked = await self._body(request, KeyRequest)
        now = int(time.time())
        message = parse_message(asked.message)
        refusal = check_challenge(await self._keys.secret(), self._site(), message, now)
        refusal = refusal or await self._check_signature(message, asked.signature)
        fresh = new_key(secrets.token_bytes(KEY_BYTES))
        key = ApiKey(
            key_id=fresh.key_id,
            digest=fresh.digest,
            wallet=message.address,
            name=asked.name,
            scopes=tuple(dict.fromkeys(asked.scopes)),
            spending_limit=asked.spending_limit,
            created_at=now,
            expires_at=now + asked.expires_in_s,
        )
        refusal = refusal or await self._keys.redeem(message, key, now)
        if refusal is not None:
            status = 409 if refusal.code == "too_many_keys" else 401
            raise ApiError(refusal.message, status=status, code=refusal.code, remedy=refusal.remedy)
        return {**key_object(key), "key": fresh.token}

    async def list_keys(self, caller: Caller) -> dict[str, Any]:
        """The wallet's keys, revoked and expired ones too, without their tokens."""
        keys = await self._keys.of_wallet(caller.wallet)
        return {"object": "list", "data": [{**key_object(key), "spent": amount_out(spent)} for key, spent in keys]}

    async def revoke(self, caller: Caller, key_id: str) -> dict[str, Any]:
        """End a key of the same wallet, at once and for good.

        Raises:
            ApiError: status 404 where the wallet has no such key.
        """
        if not await self._keys.revoke(caller.wallet, key_id, int(time.time())):
            remedy = "GET /auth/keys lists them."
            raise ApiError("The wallet has no such key", status=404, code="key_not_found", remedy=remedy)
        return {"object": "api_key.deleted", "id": key_id, "deleted": True}

    def _wallet(self, address: str) -> Wallet:
        wallet, expected = parse_wallet(address), self._site().chain_ids
        if wallet.kind not in expected:
            remedy = f"Send one of {' or '.join(CHAIN_NAMES[kind] for kind in expected)}."
            problem = f"'{wallet.address}' is an address of another chain than this coordinator's"
            raise ApiError(problem, code="wrong_chain", param="address", remedy=remedy)
        return wallet

    async def _check_signature(self, message: SignInMessage, signature: str) -> Refusal | None:
        wallet = parse_wallet(message.address)
        signed = await trio.to_thread.run_sync(
            has_signed, wallet, message.text(), signature, abandon_on_cancel=True, limiter=self._limiter
        )
        if signed:
            return None
        remedy = "Sign the message's exact text with it: personal_sign for Ethereum, signMessage for Solana."
        return Refusal("bad_signature", f"the wallet {wallet.address} did not sign this message", remedy)

    async def _body(self, request: Request, kind: type[B]) -> B:
        wait_s = self._rate.wait_s(address_of(request.remote_addr), trio.current_time())
        if wait_s:
            raise too_often(wait_s)
        with self._bodies.lease() as lease:
            return parse_body(await self._bodies.read(request, lease), kind)


def key_object(key: ApiKey) -> dict[str, Any]:
    """A key as JSON, without what would let anybody use it."""
    return {
        "object": "api_key",
        "id": key.key_id,
        "wallet": key.wallet,
        "name": key.name,
        "scopes": list(key.scopes),
        "spending_limit": None if key.spending_limit is None else amount_out(key.spending_limit),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }
