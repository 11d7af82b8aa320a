from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from solders.keypair import Keypair

from azu.errors import InputError
from azu.payments import HYPE, SOL, UNITS, coin_of, open_provider
from azu.payments.evm_account import evm_account
from azu.payments.settings import PaymentSettings

KEY = "11" * 32
EVM = evm_account(bytes.fromhex(KEY)).address
SOLANA = str(Keypair.from_seed(bytes.fromhex(KEY)).pubkey())
URL = "http://127.0.0.1:1/"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {name.upper() for name in PaymentSettings.model_fields}
    for name in [name for name in os.environ if name.upper().removeprefix("AZU_") in known]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> PaymentSettings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return PaymentSettings()


async def test_hyperliquid_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(monkeypatch, HYPERLIQUID_RPC_URL=f"{URL}, {URL}", SCHEDULER_PRIVATE_KEY=KEY)
    async with open_provider(chosen) as provider:
        told = (provider.name, provider.chain, provider.coin, provider.address)
        assert told == ("hyperliquid", "eip155:999", HYPE, EVM)
        assert KEY not in repr(vars(provider))
    assert chosen.hyperliquid_rpc_url == (URL, URL)
    assert KEY not in repr(chosen)


async def test_solana(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"AZU_PAYMENT_PROVIDER": "solana", "AZU_SOLANA_RPC_URL": URL, "SOLANA_CLUSTER": "devnet"}
    chosen = settings(monkeypatch, **variables, SCHEDULER_PRIVATE_KEY=KEY)
    async with open_provider(chosen) as provider:
        assert (provider.coin, provider.address) == (SOL, SOLANA)
        assert provider.chain == "solana:EtWTRABZaYq6iMfeYKouRu166VU2xqa1"  # as CAIP-30 has it


async def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(monkeypatch, PAYMENT_PROVIDER="none")
    assert coin_of(chosen) is UNITS
    async with open_provider(chosen) as provider:
        for refused in (
            provider.read_address(EVM),
            await provider.verify_deposit("0x", EVM),
            await provider.sign_payout(EVM, 1, label="1", after=None),
        ):
            assert refused.code == "no_payments"  # type: ignore[union-attr]


async def test_deposits_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(monkeypatch, HYPERLIQUID_RPC_URL=URL, HYPERLIQUID_ADDRESS=EVM.lower())
    async with open_provider(chosen) as provider:
        assert provider.address == EVM
        with pytest.raises(InputError) as caught:
            await provider.sign_payout(EVM, 1, label="1", after=None)
        assert caught.value.code == "no_key"


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({}, "missing_setting", "HYPERLIQUID_RPC_URL is not set"),
        ({"HYPERLIQUID_RPC_URL": URL}, "missing_setting", "HYPERLIQUID_ADDRESS"),
        ({"PAYMENT_PROVIDER": "solana"}, "missing_setting", "SOLANA_RPC_URL is not set"),
        ({"PAYMENT_PROVIDER": "solana", "SOLANA_RPC_URL": URL}, "missing_setting", "SOLANA_ADDRESS"),
        ({"HYPERLIQUID_RPC_URL": URL, "HYPERLIQUID_ADDRESS": SOLANA}, "bad_address", "not an EVM address"),
        ({"HYPERLIQUID_RPC_URL": "ftp://x/secret", "HYPERLIQUID_ADDRESS": EVM}, "bad_rpc_url", "not an http"),
        ({"HYPERLIQUID_RPC_URL": URL, "SCHEDULER_PRIVATE_KEY": "00" * 32}, "bad_key", "secp256k1"),
        ({"HYPERLIQUID_RPC_URL": URL, "SCHEDULER_PRIVATE_KEY": "11" * 64}, "bad_key", "secp256k1"),
        (
            {"HYPERLIQUID_RPC_URL": URL, "SCHEDULER_PRIVATE_KEY": KEY, "HYPERLIQUID_ADDRESS": "0x" + "22" * 20},
            "wrong_key",
            "SCHEDULER_PRIVATE_KEY is that of",
        ),
        ({"HYPERLIQUID_RPC_URL": URL, "HYPERLIQUID_ADDRESS": EVM, "MIN_DEPOSIT": "1e3"}, "bad_amount", "MIN_DEPOSIT"),
        ({"HYPERLIQUID_RPC_URL": URL, "PAYOUT_THRESHOLD": "-1"}, "bad_amount", "PAYOUT_THRESHOLD"),
    ],
)
async def test_what_is_missing_or_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], code: str, said: str
) -> None:
    chosen = settings(monkeypatch, **variables)
    with pytest.raises(InputError) as caught:
        async with open_provider(chosen):
            pass
    assert caught.value.code == code
    assert said in caught.value.message
    assert caught.value.remedy
    assert "secret" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_another_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError):
        settings(monkeypatch, PAYMENT_PROVIDER="cash")
