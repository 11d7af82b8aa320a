"""Wallets and their signatures, with the chains' own libraries as signers."""

from __future__ import annotations

import pytest
from base58 import b58encode
from hypothesis import given
from hypothesis import strategies as st
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from azu.errors import InputError
from azu.payments.evm_account import load_eth_account
from azu.payments.wallets import MAX_SIGNATURE_CHARS, Wallet, has_signed, parse_wallet
from tests.payments.anvil import account

load_eth_account()
from eth_account.messages import encode_defunct  # noqa: E402 - after its loader

TEXT = "azu.example.org wants you to sign in\n\nwith ünicode"
ALICE = account(1)
BOB = Keypair.from_seed(b"\2" * 32)
EVM = Wallet("evm", ALICE.address)
SOLANA = Wallet("solana", str(BOB.pubkey()))


def evm_signature(text: str = TEXT) -> str:
    return "0x" + bytes(ALICE.sign_message(encode_defunct(text=text)).signature).hex()


def solana_signature(text: str = TEXT) -> str:
    return str(BOB.sign_message(text.encode()))


@pytest.mark.parametrize("text", [EVM.address, EVM.address.lower(), "0x" + EVM.address[2:].upper()])
def test_an_ethereum_address_has_one_spelling(text: str) -> None:
    assert parse_wallet(text) == EVM


def test_a_solana_address_is_what_it_is() -> None:
    assert parse_wallet(SOLANA.address) == SOLANA


@pytest.mark.parametrize(
    "text",
    ["", "0x", "0x12", EVM.address[:-1], EVM.address + "0", EVM.address.swapcase(), SOLANA.address[:-2], "0" * 40, "é"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_wallet(text)
    assert caught.value.code == "bad_address"


def test_its_own_signature_counts() -> None:
    assert has_signed(EVM, TEXT, evm_signature())
    assert has_signed(SOLANA, TEXT, solana_signature())
    assert max(len(evm_signature()), len(solana_signature())) <= MAX_SIGNATURE_CHARS


def test_a_signature_of_another_text_or_wallet_does_not() -> None:
    other = Wallet("evm", account(3).address)
    assert not has_signed(EVM, TEXT + " ", evm_signature())
    assert not has_signed(other, TEXT, evm_signature())
    assert not has_signed(SOLANA, TEXT + " ", solana_signature())
    assert not has_signed(Wallet("solana", str(Keypair.from_seed(b"\4" * 32).pubkey())), TEXT, solana_signature())
    assert not has_signed(SOLANA, TEXT, evm_signature())
    assert not has_signed(EVM, TEXT, solana_signature())


def test_a_point_outside_the_curve_has_signed_nothing() -> None:
    off = next(key for number in range(256) if not (key := Pubkey(bytes([number]) * 32)).is_on_curve())
    assert not has_signed(Wallet("solana", str(off)), TEXT, solana_signature())


@given(st.binary(min_size=65, max_size=65))
def test_any_65_bytes_are_no_fault(raw: bytes) -> None:
    assert not has_signed(EVM, TEXT, "0x" + raw.hex())


@given(st.integers(0, 64), st.integers(1, 255))
def test_a_changed_byte_shows(place: int, change: int) -> None:
    raw = bytearray.fromhex(evm_signature()[2:])
    raw[place] ^= change
    if place < 64 or raw[64] + 27 != bytes.fromhex(evm_signature()[2:])[64]:  # v is also written 0 or 1
        assert not has_signed(EVM, TEXT, "0x" + raw.hex())


@given(st.text() | st.binary(min_size=64, max_size=64).map(lambda raw: b58encode(raw).decode()))
def test_any_text_is_no_fault(text: str) -> None:
    assert not has_signed(EVM, TEXT, text)
    assert not has_signed(SOLANA, TEXT, text)
