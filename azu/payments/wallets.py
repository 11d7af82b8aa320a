"""Wallet addresses in their one spelling, and who signed a text: Ethereum's accounts and Solana's.

An Ethereum address is written with EIP-55's checksum, a Solana one in base58. Smart-contract wallets (EIP-1271) cannot
sign in: they have no key, and asking their contract is another chain's answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

import base58

from azu.payments.addresses import check_evm_address, check_solana_address
from azu.payments.evm_account import load_eth_account

__all__ = ["MAX_SIGNATURE_CHARS", "Wallet", "WalletKind", "has_signed", "parse_wallet"]

WalletKind = Literal["evm", "solana"]

MAX_SIGNATURE_CHARS = 132  # of an Ethereum one: 0x and 65 bytes; Solana's 64 bytes take 88 in base58
# r, s and v; eth_account takes more values of v than anybody writes for a message.
_EVM_SIGNATURE: Final = re.compile(r"0x[0-9a-fA-F]{128}(0[01]|1[bBcC])")
_SOLANA_SIGNATURE: Final = re.compile(r"[1-9A-HJ-NP-Za-km-z]{64,88}")
_SOLANA_SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Wallet:
    """An account on a chain; equal wallets are spelt equally."""

    kind: WalletKind
    address: str


def parse_wallet(text: str) -> Wallet:
    """A wallet's address, as people and programs write it.

    Raises:
        InputError: code "bad_address".
    """
    if text[:2].lower() == "0x":
        return Wallet("evm", check_evm_address(text))
    return Wallet("solana", check_solana_address(text))


def has_signed(wallet: Wallet, text: str, signature: str) -> bool:
    """Whether the wallet's key made that signature of the text.

    Takes a millisecond, and some hundred for the first, which loads the chain's library: call it in a thread.

    Args:
        signature: of an Ethereum wallet the 65 bytes of personal_sign (EIP-191) in hex after 0x, of a Solana wallet the
            64 bytes of signMessage in base58.
    """
    if wallet.kind == "evm":
        return _EVM_SIGNATURE.fullmatch(signature) is not None and _evm_signer(text, signature) == wallet.address
    return _SOLANA_SIGNATURE.fullmatch(signature) is not None and _solana_signed(wallet.address, text, signature)


def _evm_signer(text: str, signature: str) -> str | None:
    load_eth_account()
    from eth_account import Account
    from eth_account.messages import encode_defunct
    from eth_keys.exceptions import BadSignature
    from eth_utils.exceptions import ValidationError

    try:
        return str(Account.recover_message(encode_defunct(text=text), signature=signature))
    except (BadSignature, ValidationError, ValueError):  # a v, r or s that no key makes
        return None


def _solana_signed(address: str, text: str, signature: str) -> bool:
    from solders.pubkey import Pubkey
    from solders.signature import Signature

    raw = base58.b58decode(signature)
    if len(raw) != _SOLANA_SIGNATURE_BYTES:
        return False
    return bool(Signature(raw).verify(Pubkey.from_string(address), text.encode()))
