"""A finalised Solana transaction out of what getTransaction answers: who signed it, and who sent what to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import base58

from azu.errors import ProtocolError
from azu.payments.answers import listing, record, text, whole

__all__ = ["Landed", "decode58", "read_landed"]

_SYSTEM_PROGRAM = "11111111111111111111111111111111"
_TRANSFER = (2).to_bytes(4, "little")  # SystemInstruction::Transfer, followed by the lamports as a u64
_MAX_DATA_CHARS = 2_048  # base58 of more than a whole transaction


@dataclass(frozen=True, slots=True)
class Landed:
    """A finalised transaction; keys, pre and post balances go by the same index."""

    signatures: Sequence[str]
    signers: int
    keys: Sequence[str]
    instructions: Sequence[Mapping[str, Any]]
    failed: bool
    fee: int
    before: Sequence[int]
    after: Sequence[int]

    def change(self, address: str) -> int:
        """Lamports that an account won or lost."""
        at = self.keys.index(address)
        return self.after[at] - self.before[at]

    def sent(self, sender: str, recipient: str) -> int:
        """Lamports in system transfers from one to the other that the sender signed."""
        if sender not in self.keys[: self.signers]:
            return 0
        return sum(map(partial(self._transferred, sender, recipient), self.instructions))

    def _transferred(self, sender: str, recipient: str, instruction: Mapping[str, Any]) -> int:
        accounts = [self._key(at) for at in listing(whole)(instruction.get("accounts"))]
        # Solana Pay names further accounts behind the two, as references.
        if self._key(whole(instruction.get("programIdIndex"))) != _SYSTEM_PROGRAM or accounts[:2] != [
            sender,
            recipient,
        ]:
            return 0
        data = decode58(text(instruction.get("data")))
        return int.from_bytes(data[4:], "little") if len(data) == 12 and data[:4] == _TRANSFER else 0

    def _key(self, at: int) -> str:
        if at >= len(self.keys):
            raise ProtocolError(f"account {at} of {len(self.keys)}", code="rpc_bad_answer")
        return self.keys[at]


def decode58(value: str) -> bytes:
    """Base58's bytes; none of text that is too long for any.

    Raises:
        ProtocolError: not base58.
    """
    try:
        return base58.b58decode(value) if len(value) <= _MAX_DATA_CHARS else b""
    except ValueError as error:
        raise ProtocolError(f"{value[:80]!r} is not base58", code="rpc_bad_answer") from error


def read_landed(value: object) -> Landed:
    """Raises ProtocolError where it is no such answer."""
    whole_of_it, texts, numbers = record(value), listing(text), listing(whole)
    meta, transaction = record(whole_of_it.get("meta")), record(whole_of_it.get("transaction"))
    message = record(transaction.get("message"))
    loaded = record(meta.get("loadedAddresses") or {"writable": [], "readonly": []})
    keys = [*texts(message.get("accountKeys")), *texts(loaded.get("writable")), *texts(loaded.get("readonly"))]
    landed = Landed(
        signatures=texts(transaction.get("signatures")),
        signers=whole(record(message.get("header")).get("numRequiredSignatures")),
        keys=keys,
        instructions=listing(record)(message.get("instructions")),
        failed=meta.get("err") is not None,
        fee=whole(meta.get("fee")),
        before=numbers(meta.get("preBalances")),
        after=numbers(meta.get("postBalances")),
    )
    if not len(landed.before) == len(landed.after) == len(keys):
        raise ProtocolError("balances and accounts are not as many", code="rpc_bad_answer")
    return landed
