"""An EVM private key, and the library that works with it."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol

from azu.errors import InputError

__all__ = ["EvmAccount", "evm_account", "load_eth_account"]


def load_eth_account() -> None:
    """Load eth_account, which takes most of a second; every first import of it has to come through here.

    It brings py_ecc, which raises the process's recursion limit a hundredfold as it is imported: a few kilobytes of "["
    to any JSON reader of the process, and the stack overflows. The limit is put back.
    """
    limit = sys.getrecursionlimit()
    try:
        importlib.import_module("eth_account")
    finally:
        sys.setrecursionlimit(limit)


class EvmAccount(Protocol):
    """A private key at work."""

    address: str

    def sign(self, fields: dict[str, object]) -> tuple[str, bytes]:
        """A transaction's hash and its bytes."""

    def sign_text(self, text: str) -> str:
        """The signature of personal_sign (EIP-191), in hex after 0x."""

    def has_made(self, raw: bytes, chain_id: int) -> bool:
        """Whether the key signed these bytes, for that chain."""

    def offer(self, raw: bytes) -> int:
        """The most wei that a transaction of EIP-1559 pays for a unit of gas."""

    def reprice(self, raw: bytes, offer: int) -> tuple[str, bytes]:
        """The same transaction with another offer, signed by the key: its hash and its bytes."""


def evm_account(key: bytes) -> EvmAccount:
    """The account of a private key.

    Raises:
        InputError: code "bad_key": no private key of the curve.
    """
    load_eth_account()
    from eth_account import Account
    from eth_account.messages import encode_defunct
    from eth_account.typed_transactions.typed_transaction import TypedTransaction
    from eth_utils.exceptions import ValidationError
    from hexbytes import HexBytes

    try:
        account = Account.from_key(key)
    except (ValueError, ValidationError) as error:
        raise InputError(
            "the private key is none of secp256k1",
            code="bad_key",
            remedy="SCHEDULER_PRIVATE_KEY takes the 32 bytes of an EVM account",
        ) from error

    class _Account:
        address = str(account.address)

        def sign(self, fields: dict[str, object]) -> tuple[str, bytes]:
            signed = account.sign_transaction(fields)
            return f"0x{bytes(signed.hash).hex()}", bytes(signed.raw_transaction)

        def sign_text(self, text: str) -> str:
            return f"0x{bytes(account.sign_message(encode_defunct(text=text)).signature).hex()}"

        def has_made(self, raw: bytes, chain_id: int) -> bool:
            return bool(_fields(raw)["chainId"] == chain_id and Account.recover_transaction(raw) == self.address)

        def offer(self, raw: bytes) -> int:
            return int(_fields(raw)["maxFeePerGas"])

        def reprice(self, raw: bytes, offer: int) -> tuple[str, bytes]:
            unsigned = {name: value for name, value in _fields(raw).items() if name not in ("v", "r", "s")}
            return self.sign(unsigned | {"maxFeePerGas": offer})

    def _fields(raw: bytes) -> dict[str, Any]:
        return dict(TypedTransaction.from_bytes(HexBytes(raw)).as_dict())

    return _Account()
