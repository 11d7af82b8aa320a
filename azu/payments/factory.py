"""The provider that the settings name. A chain's library is loaded only where a private key is given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from azu.errors import InputError
from azu.payments.addresses import check_evm_address, check_solana_address
from azu.payments.base import PaymentProvider
from azu.payments.coin import HYPE, SOL, UNITS, Coin
from azu.payments.keys import ed25519_seed, read_private_key
from azu.payments.none import NoPayments
from azu.payments.settings import PaymentSettings

if TYPE_CHECKING:
    from azu.payments.rpc import Rpc

__all__ = ["coin_of", "open_provider"]


def coin_of(settings: PaymentSettings) -> Coin:
    """The coin that the ledger counts in; needs no chain."""
    return {"hyperliquid": HYPE, "solana": SOL, "none": UNITS}[settings.payment_provider]


@asynccontextmanager
async def open_provider(settings: PaymentSettings) -> AsyncIterator[PaymentProvider]:
    """The provider, whose connections are closed at the end; nothing is asked of the chain yet.

    Raises:
        InputError: a setting is missing ("missing_setting") or cannot work ("bad_key", "bad_address", "wrong_key",
            "bad_rpc_url", "bad_amount").
    """
    if settings.payment_provider == "none":
        yield NoPayments()
        return
    _amount(settings, "payout_threshold")  # what reads it comes later; what is wrong is said now
    provider, rpc = _hyperliquid(settings) if settings.payment_provider == "hyperliquid" else _solana(settings)
    async with rpc:
        yield provider


def _hyperliquid(settings: PaymentSettings) -> tuple[PaymentProvider, Rpc]:
    from azu.payments.evm_account import evm_account
    from azu.payments.hyperliquid import Hyperliquid, chain_check
    from azu.payments.rpc import Rpc

    if not settings.hyperliquid_rpc_url:
        raise _missing(settings, "HYPERLIQUID_RPC_URL")
    key = settings.scheduler_private_key
    account = None if key is None else evm_account(read_private_key(key))
    given = settings.hyperliquid_address and check_evm_address(settings.hyperliquid_address)
    address = _address(settings, "HYPERLIQUID_ADDRESS", given, None if account is None else account.address)
    rpc = Rpc(settings.hyperliquid_rpc_url, chain_check(settings.hyperliquid_chain_id))
    provider = Hyperliquid(
        rpc,
        chain_id=settings.hyperliquid_chain_id,
        address=address,
        account=account,
        confirmations=settings.hyperliquid_confirmations,
        min_deposit=_amount(settings, "min_deposit"),
    )
    return provider, rpc


def _solana(settings: PaymentSettings) -> tuple[PaymentProvider, Rpc]:
    from azu.payments.rpc import Rpc
    from azu.payments.solana import GENESIS, Solana, chain_check
    from azu.payments.solana_account import solana_account

    if not settings.solana_rpc_url:
        raise _missing(settings, "SOLANA_RPC_URL")
    key = settings.scheduler_private_key
    account = None if key is None else solana_account(ed25519_seed(read_private_key(key)))
    given = settings.solana_address and check_solana_address(settings.solana_address)
    address = _address(settings, "SOLANA_ADDRESS", given, None if account is None else account.address)
    genesis = GENESIS.get(settings.solana_cluster) or check_solana_address(settings.solana_cluster)
    rpc = Rpc(settings.solana_rpc_url, chain_check(genesis))
    min_deposit = _amount(settings, "min_deposit")
    return Solana(rpc, genesis=genesis, address=address, account=account, min_deposit=min_deposit), rpc


def _amount(settings: PaymentSettings, name: Literal["payout_threshold", "min_deposit"]) -> int:
    try:
        return coin_of(settings).parse(getattr(settings, name))
    except InputError as error:
        raise InputError(f"{name.upper()}: {error.message}", code=error.code, remedy=error.remedy) from error


def _address(settings: PaymentSettings, name: str, given: str | None, own: str | None) -> str:
    """The platform's address: as set, or the key's, which must be the same where both are given."""
    if given and own and given != own:
        raise InputError(
            f"{name} is {given}, but SCHEDULER_PRIVATE_KEY is that of {own}",
            code="wrong_key",
            remedy="Give the key of that address, or leave one of the two out",
        )
    if not given and not own:
        raise _missing(settings, f"{name} (or SCHEDULER_PRIVATE_KEY)")
    return given or own or ""


def _missing(settings: PaymentSettings, name: str) -> InputError:
    return InputError(
        f"PAYMENT_PROVIDER is {settings.payment_provider}, and {name} is not set",
        code="missing_setting",
        remedy="Set it, or set PAYMENT_PROVIDER=none for a swarm without money",
    )
