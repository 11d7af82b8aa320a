"""Solana's real runtime in this process, behind the part of its JSON-RPC that azu asks: as Agave answers it.

The runtime belongs to the thread that serves it, so tests reach it through the same door: `airdrop`, `expireBlockhash`,
`setFinalized` and `rent` are methods of their own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import base58
from solders.litesvm import LiteSVM
from solders.message import Message
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata

from tests.payments.http_server import Reply, as_json, serve

__all__ = ["GENESIS", "open_solana"]

GENESIS = "GH7ome3EiwEr7tu9JuTh2dpYWBJK3z69Xm1ZE3MEE6JC"
_VALID_BLOCKS = 150
_FEE = 5_000


class _Node:
    """Every transaction that is sent lands in a block of its own; whether that is final is up to the test."""

    def __init__(self) -> None:
        self._svm = LiteSVM()
        self._height = 1_000
        self._is_final = True
        self._landed: dict[str, dict[str, Any]] = {}
        self._methods: dict[str, Callable[..., Any]] = {
            "getGenesisHash": lambda: GENESIS,
            "getBlockHeight": lambda *_: self._height,
            "getBalance": lambda address, *_: _value(self._svm.get_balance(Pubkey.from_string(address)) or 0),
            "getLatestBlockhash": self._blockhash,
            "getFeeForMessage": lambda message, *_: _value(
                _FEE * Message.from_bytes(base64.b64decode(message)).header.num_required_signatures
            ),
            "simulateTransaction": self._simulate,
            "sendTransaction": self._send,
            "getSignatureStatuses": self._statuses,
            "getTransaction": self._transaction,
            "airdrop": self._airdrop,
            "expireBlockhash": self._expire,
            "setFinalized": self._finalize,
        }

    def answer(self, body: bytes) -> Reply:
        """Serve one request."""
        question = json.loads(body)
        reply = {"jsonrpc": "2.0", "id": question["id"]}
        method = self._methods.get(question["method"])
        if method is None:
            return as_json({**reply, "error": {"code": -32601, "message": "Method not found"}})
        try:
            return as_json({**reply, "result": method(*question["params"])})
        except ValueError as error:
            return as_json({**reply, "error": {"code": -32002, "message": str(error)}})

    def _blockhash(self, *_: object) -> object:
        latest = {"blockhash": str(self._svm.latest_blockhash()), "lastValidBlockHeight": self._height + _VALID_BLOCKS}
        return _value(latest)

    def _simulate(self, encoded: str, *_: object) -> object:
        done = self._svm.simulate_transaction(_decoded(encoded))
        return _value({"err": _err(done), "logs": done.meta().logs()})

    def _send(self, encoded: str, options: dict[str, Any]) -> str:
        transaction = _decoded(encoded)
        signature = str(transaction.signatures[0])
        keys = [str(key) for key in transaction.message.account_keys]
        before = self._balances(keys)
        done = self._svm.send_transaction(transaction)
        if signature in self._landed:
            return signature
        err = _err(done)
        if err == "BlockhashNotFound":  # no leader takes it; the node answers all the same without preflight
            if not options.get("skipPreflight"):
                raise ValueError("Transaction simulation failed: Blockhash not found")
            return signature
        self._height += 1
        self._landed[signature] = {"slot": self._height, **_told(transaction, keys, before, self._balances(keys), err)}
        return signature

    def _statuses(self, signatures: list[str], *_: object) -> object:
        return _value([self._status(self._landed.get(signature)) for signature in signatures])

    def _status(self, landed: dict[str, Any] | None) -> object:
        if landed is None:
            return None
        level = "finalized" if self._is_final else "confirmed"
        return {
            "slot": landed["slot"],
            "confirmations": None,
            "err": landed["meta"]["err"],
            "confirmationStatus": level,
        }

    def _transaction(self, signature: str, options: dict[str, Any]) -> object:
        assert options["commitment"] == "finalized"
        return self._landed.get(signature) if self._is_final else None

    def _airdrop(self, address: str, lamports: int) -> None:
        self._svm.airdrop(Pubkey.from_string(address), lamports)

    def _expire(self) -> None:
        self._svm.expire_blockhash()
        self._height += _VALID_BLOCKS + 1

    def _finalize(self, is_final: bool) -> None:
        self._is_final = is_final

    def _balances(self, keys: list[str]) -> list[int]:
        return [self._svm.get_balance(Pubkey.from_string(key)) or 0 for key in keys]


@contextmanager
def open_solana() -> Iterator[str]:
    """The URL of a node with a chain of its own."""
    made: list[_Node] = []

    def answer(body: bytes) -> Reply:
        if not made:
            made.append(_Node())  # here, in the serving thread
        return made[0].answer(body)

    with serve(answer, threads=False) as url:
        yield url


def _value(value: object) -> object:
    return {"context": {"slot": 1}, "value": value}


def _decoded(encoded: str) -> VersionedTransaction:
    return VersionedTransaction.from_bytes(base64.b64decode(encoded))


def _err(done: Any) -> Any:
    return (
        str(done.err()).removeprefix("TransactionErrorFieldless.")
        if isinstance(done, FailedTransactionMetadata)
        else None
    )


def _told(
    transaction: VersionedTransaction, keys: list[str], before: list[int], after: list[int], err: object
) -> dict[str, Any]:
    """As getTransaction tells it, with "encoding": "json"."""
    message = transaction.message
    instructions = [
        {
            "programIdIndex": each.program_id_index,
            "accounts": list(each.accounts),
            "data": base58.b58encode(bytes(each.data)).decode(),
        }
        for each in message.instructions
    ]
    header = {"numRequiredSignatures": message.header.num_required_signatures}
    told = {"header": header, "accountKeys": keys, "instructions": instructions}
    fee = _FEE * message.header.num_required_signatures
    return {
        "transaction": {"signatures": [str(each) for each in transaction.signatures], "message": told},
        "meta": {"err": err, "fee": fee, "preBalances": before, "postBalances": after, "loadedAddresses": None},
    }
