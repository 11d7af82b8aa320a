"""POST /deposit, GET /balance and GET /usage: what a wallet paid in, has, and used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final

import trio
from pydantic import Field
from quart import Request

from azu.accounts.rate import RateLimit
from azu.ledger import JobUse, Ledger, accounts
from azu.payments.base import Deposit, PaymentProvider
from azu.tickets import Refusal
from coordinator.api.amounts import amount_out
from coordinator.api.auth import Caller, address_of
from coordinator.api.bodies import Bodies
from coordinator.api.errors import ApiError, too_often
from coordinator.api.pricing import currency_object
from coordinator.api.requests import Strict, parse_body
from coordinator.api.settings import ApiSettings
from coordinator.api.till import deposit_object

__all__ = ["Accounts"]

_MAX_BODY_BYTES = 4_096
# Each claim costs a few questions to the chain's RPC.
_BURST, _PER_S, _AT_ONCE = 10, 0.5, 8
_MAX_USES = 1_000
_RETRY_S = 5
# What a refused claim is in HTTP: 404 and 409 may change with time, 400 does not.
_STATUSES: Final[Mapping[str, int]] = {
    "tx_not_found": 404,
    "tx_pending": 409,
    "tx_unconfirmed": 409,
    "tx_reorganised": 409,
    "already_claimed": 409,
}


class DepositRequest(Strict):
    """A transaction that paid the platform, and the wallet that sent it."""

    tx_sig: Annotated[str, Field(min_length=1, max_length=128)]
    user_pubkey: Annotated[str, Field(min_length=1, max_length=64)]


class Accounts:
    """What the routes do; one for the app."""

    def __init__(self, ledger: Ledger, provider: PaymentProvider) -> None:
        self._ledger = ledger
        self._provider = provider
        self._bodies = Bodies(replace(ApiSettings(), max_body_bytes=_MAX_BODY_BYTES))
        self._rate = RateLimit(burst=_BURST, per_s=_PER_S)
        self._limiter = trio.CapacityLimiter(_AT_ONCE)

    async def deposit(self, request: Request) -> dict[str, Any]:
        """Credit a transaction to the wallet that sent it, whoever claims it.

        Raises:
            ApiError: it is no deposit of that wallet, or not yet, or was claimed before; nothing has changed.
            NetworkError: the chain cannot be asked.
        """
        if wait_s := self._rate.wait_s(address_of(request.remote_addr), trio.current_time()):
            raise too_often(wait_s)
        with self._bodies.lease() as lease:
            claim = parse_body(await self._bodies.read(request, lease), DepositRequest)
        async with self._limiter:
            found = await self._provider.verify_deposit(claim.tx_sig, claim.user_pubkey)
        if isinstance(found, Refusal):
            raise _refused(found)
        return await self._credit(found)

    async def _credit(self, found: Deposit) -> dict[str, Any]:
        credited = await self._ledger.deposit(found.provider, found.chain, found.txid, found.wallet, found.amount)
        if not credited.is_new:
            amount = self._provider.coin.format(credited.amount)
            problem = f"the transaction {credited.txid} was claimed before, and gave {credited.wallet} {amount}"
            raise _refused(Refusal("already_claimed", problem, "It counts once. GET /balance shows what there is."))
        return {
            "object": "deposit",
            "chain": credited.chain,
            "tx_sig": credited.txid,
            "wallet": credited.wallet,
            "amount": amount_out(credited.amount),
            "currency": currency_object(self._provider),
            "balance": amount_out(await self._ledger.balance(accounts.client(credited.wallet))),
        }

    async def balance(self, caller: Caller) -> dict[str, Any]:
        """What the caller may spend, and what is put aside for its running requests."""
        head: dict[str, Any] = {"object": "balance", "wallet": caller.wallet or None, "free": not caller.wallet}
        if caller.wallet:
            head["available"] = amount_out(await self._ledger.balance(accounts.client(caller.wallet)))
            head["reserved"] = amount_out(await self._ledger.balance(accounts.reserved(caller.wallet)))
        deposit = deposit_object(self._provider) if caller.wallet and self._provider.address else None
        return {**head, "currency": currency_object(self._provider), "deposit": deposit}

    async def usage(self, caller: Caller, query: Mapping[str, str]) -> dict[str, Any]:
        """What the caller used, the latest first; nothing where use is free, since nobody knows who asked.

        Raises:
            ApiError: `since` (unix seconds) or `limit` is no number.
        """
        since = _number(query, "since", 0, 0, 2**40)
        limit = _number(query, "limit", 100, 1, _MAX_USES)
        uses = await self._ledger.usage(caller.wallet, since=since, limit=limit) if caller.wallet else []
        return {
            "object": "list",
            "wallet": caller.wallet or None,
            "currency": currency_object(self._provider),
            "data": [_use_object(use) for use in uses],
        }


def _use_object(use: JobUse) -> dict[str, Any]:
    return {
        "object": "usage",
        "job_id": use.job_id,
        "manifest": use.manifest,
        "at": use.settled_at,
        "prompt_tokens": use.prompt_tokens,
        "completion_tokens": use.completion_tokens,
        "token_layers": use.token_layers,
        "cost": amount_out(use.cost),
        "key_id": use.key_id,
    }


def _refused(refusal: Refusal) -> ApiError:
    status = _STATUSES.get(refusal.code, 400)
    headers = {"Retry-After": str(_RETRY_S)} if refusal.code in ("tx_pending", "tx_unconfirmed") else {}
    param = "user_pubkey" if refusal.code in ("bad_address", "wrong_sender") else "tx_sig"
    return ApiError(
        refusal.message, status=status, code=refusal.code, param=param, remedy=refusal.remedy, headers=headers
    )


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if text.isascii() and text.isdigit() and len(text) <= 15 and least <= int(text) <= most:
        return int(text)
    raise ApiError(f"Invalid '{name}': expected {least} to {most}", code="invalid_value", param=name)
