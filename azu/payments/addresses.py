"""Wallet addresses of the chains that azu pays on, checked without any chain's library: a worker has none installed."""

from __future__ import annotations

import re

import base58
from Crypto.Hash import keccak

from azu.errors import InputError

__all__ = ["check_evm_address", "check_payout_address", "check_solana_address"]

_EVM = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_SOLANA_BYTES = 32
_SOLANA_CHARS = 44  # the longest base58 of 32 bytes


def check_evm_address(text: str) -> str:
    """An EVM address with its EIP-55 checksum; one without (all in lower or upper case) is taken and given one.

    Raises:
        InputError: code "bad_address".
    """
    digits = text[2:]
    if not _EVM.fullmatch(text) or not int(digits, 16):
        raise _refused(text, "an EVM address", "It has 0x and 40 hexadecimal digits, not all zero.")
    checked = _with_checksum(digits.lower())
    if digits not in (digits.lower(), digits.upper(), checked):
        raise _refused(text, "an EVM address: its checksum does not hold", "Copy it again from the wallet.")
    return f"0x{checked}"


def _with_checksum(digits: str) -> str:
    digest = keccak.new(data=digits.encode(), digest_bits=256).hexdigest()
    return "".join(
        digit.upper() if int(nibble, 16) >= 8 else digit for digit, nibble in zip(digits, digest, strict=False)
    )


def check_solana_address(text: str) -> str:
    """A Solana address: base58 of 32 bytes.

    Raises:
        InputError: code "bad_address".
    """
    try:
        raw = base58.b58decode(text) if text.isascii() and len(text) <= _SOLANA_CHARS else b""
    except ValueError:
        raw = b""
    # base58 ignores white space at its ends: only what comes out again as it went in has one spelling.
    if len(raw) != _SOLANA_BYTES or not any(raw) or base58.b58encode(raw).decode() != text:
        raise _refused(text, "a Solana address", "It has 32 to 44 letters and digits, as the wallet shows it.")
    return text


def check_payout_address(text: str) -> str:
    """An address of any chain that azu pays on, for a worker that does not know yet which its coordinator uses.

    Raises:
        InputError: code "bad_address".
    """
    return check_evm_address(text) if text[:2].lower() == "0x" else check_solana_address(text)


def _refused(text: str, what: str, remedy: str) -> InputError:
    return InputError(f"{text[:60]!r} is not {what}", code="bad_address", remedy=remedy)
