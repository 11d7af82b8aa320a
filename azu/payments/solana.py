"""Deposits and payouts in SOL: system transfers, read and confirmed at the finalised commitment only.

What a deposit credits is what the platform's balance grew by, and all of it must have been sent by the claimed wallet,
in system transfers that it signed. A payout is valid for some 150 blocks: then it either has landed or never will.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import partial

import base58

from azu.errors import InputError, ProtocolError
from azu.payments.addresses import check_solana_address
from azu.payments.answers import listing, optional, record, text, whole
from azu.payments.base import Deposit, Landing, Refusal, SignedPayout
from azu.payments.coin import SOL
from azu.payments.keys import no_key
from azu.payments.rpc import ChainCheck, Endpoint, Rpc, RpcError
from azu.payments.solana_account import SolanaAccount
from azu.payments.solana_landed import Landed, decode58, read_landed

__all__ = ["GENESIS", "Solana", "chain_check"]

# The public clusters' genesis hashes, by which an RPC shows which of them it serves.
GENESIS = {
    "mainnet-beta": "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdpKuc147dw2N9d",
    "testnet": "4uhcVJyU9pJkvQyS88uRDiswHXSCkY3zQawwpjk2NsNY",
    "devnet": "EtWTRABZaYq6iMfeYKouRu166VU2xqa1wcaWoxPkrZBG",
}
_SIGNATURE_BYTES, _SIGNATURE_CHARS, _HASH_BYTES = 64, 88, 32
_FINALIZED = {"commitment": "finalized"}
_MOST_LAMPORTS = 2**64 - 1


def chain_check(genesis: str) -> ChainCheck:
    """What an RPC of the cluster answers."""
    names = {value: name for name, value in GENESIS.items()}
    return ChainCheck("getGenesisHash", genesis, f"Solana's {names.get(genesis, genesis)}")


@dataclass(frozen=True, slots=True)
class _Status:
    is_final: bool
    failed: bool


def _read_status(value: object) -> _Status | None:
    entries = listing(optional(record))(record(value).get("value"))
    if len(entries) != 1:
        raise ProtocolError(f"{len(entries)} statuses", code="rpc_bad_answer")
    entry = entries[0]
    return (
        None if entry is None else _Status(entry.get("confirmationStatus") == "finalized", entry.get("err") is not None)
    )


def _read_number(value: object) -> int:
    return whole(record(value).get("value"))


def _read_blockhash(value: object) -> tuple[str, int]:
    latest = record(record(value).get("value"))
    blockhash = text(latest.get("blockhash"))
    if len(decode58(blockhash)) != _HASH_BYTES:
        raise ProtocolError(f"{blockhash[:80]!r} is no blockhash", code="rpc_bad_answer")
    return blockhash, whole(latest.get("lastValidBlockHeight"))


def _read_problem(value: object) -> str:
    problem = record(record(value).get("value")).get("err")
    return "" if problem is None else str(problem)[:200]


class Solana:
    """The provider of one platform address; see `azu.payments.base.PaymentProvider`.

    Args:
        genesis: the cluster's genesis hash.
        account: of that address; None where this process may not pay.
        min_deposit: lamports.
    """

    name = "solana"
    coin = SOL
    max_in_flight = 32

    def __init__(
        self, rpc: Rpc, *, genesis: str, address: str, account: SolanaAccount | None, min_deposit: int
    ) -> None:
        self.chain = f"solana:{genesis[:32]}"
        self.address = address
        self._rpc = rpc
        self._account = account
        self._min_deposit = min_deposit

    def read_address(self, text: str) -> str | Refusal:
        """An address, which has one spelling only."""
        try:
            return check_solana_address(text)
        except InputError as error:
            return Refusal(error.code, error.message, error.remedy)

    async def balance(self, address: str) -> int:
        """Lamports, finalised."""
        return await self._rpc.call("getBalance", address, _FINALIZED, read=_read_number)

    # --- deposits ---

    async def verify_deposit(self, txid: str, wallet: str) -> Deposit | Refusal:
        """See `PaymentProvider.verify_deposit`."""
        if not _is_signature(txid):
            return Refusal("bad_txid", f"{txid[:100]!r} is no transaction signature", "It is base58 of 64 bytes.")
        sender = self.read_address(wallet)
        if isinstance(sender, Refusal):
            return sender
        landed = await self._landed(txid)
        if landed is None:
            return await self._unfinished(txid)
        refusal = self._check(landed, txid, sender)
        return refusal or Deposit(self.name, self.chain, txid, sender, landed.change(self.address))

    async def _landed(self, txid: str) -> Landed | None:
        options = {**_FINALIZED, "encoding": "json", "maxSupportedTransactionVersion": 0}
        landed = await self._rpc.call("getTransaction", txid, options, read=optional(read_landed))
        return landed if landed is not None and txid in landed.signatures[:1] else None

    async def _unfinished(self, txid: str) -> Refusal:
        status = await self._rpc.call(*_status_question(txid), read=_read_status)
        if status is None:
            remedy = f"Check its signature, and that it was sent on {self.chain}."
            return Refusal("tx_not_found", f"the chain knows no transaction {txid}", remedy)
        return Refusal("tx_unconfirmed", f"transaction {txid} is not finalised yet", "Claim it again in half a minute.")

    def _check(self, landed: Landed, txid: str, wallet: str) -> Refusal | None:
        if landed.failed:
            return Refusal("tx_failed", f"transaction {txid} failed on the chain and moved nothing", "Send it again.")
        credit = landed.change(self.address) if self.address in landed.keys else 0
        if credit <= 0:
            told = f"the transaction does not pay {self.address}"
            return Refusal("wrong_recipient", told, f"Send {SOL.symbol} to that address.")
        if landed.sent(wallet, self.address) < credit:
            told = f"the transaction's {SOL.format(credit)} were not sent by {wallet} alone, in a plain transfer"
            return Refusal("wrong_sender", told, "A deposit counts for the wallet that sent it: sign in with that one.")
        if credit < self._min_deposit:
            told = f"the transaction pays {SOL.format(credit)}"
            return Refusal("deposit_too_small", told, f"The least that is taken is {SOL.format(self._min_deposit)}.")
        return None

    # --- payouts ---

    async def sign_payout(self, payee: str, amount: int, *, label: str, after: int | None) -> SignedPayout | Refusal:
        """See `PaymentProvider.sign_payout`; `after` means nothing here.

        Raises:
            InputError: code "no_key", where this process may not pay.
        """
        if self._account is None:
            raise no_key()
        to = self.read_address(payee)
        if isinstance(to, Refusal):
            return to
        if not 0 < amount <= _MOST_LAMPORTS:
            return Refusal("bad_amount", f"{amount} lamports cannot be paid")
        blockhash, valid_until = await self._rpc.call("getLatestBlockhash", _FINALIZED, read=_read_blockhash)
        txid, message, raw = self._account.pay(to, amount, label, blockhash)
        fee = await self._rpc.call("getFeeForMessage", _base64(message), _FINALIZED, read=_read_number)
        short = amount + fee - await self.balance(self.address)
        if short > 0:
            told = f"the platform's {self.address} lacks {SOL.format(short)} for this payout and its fee"
            return Refusal("platform_short", told, f"Send {SOL.symbol} to it.")
        problem = await self._rpc.call(
            "simulateTransaction", _base64(raw), {**_FINALIZED, "encoding": "base64"}, read=_read_problem
        )
        if problem:  # a new account, say, that would hold less than its rent
            remedy = "Pay more at a time (PAYOUT_THRESHOLD), or let the worker name another address."
            return Refusal("payee_refuses", f"{to} cannot be paid {SOL.format(amount)}: {problem}", remedy)
        return SignedPayout(txid, raw, valid_until)

    async def send(self, payout: SignedPayout) -> Refusal | None:
        """See `PaymentProvider.send`. It was simulated when it was signed."""
        options = {"encoding": "base64", "skipPreflight": True}
        try:
            await self._rpc.call("sendTransaction", _base64(payout.raw), options, read=text)
        except RpcError as error:
            return Refusal("not_taken", error.message)
        return None

    async def look(self, payout: SignedPayout) -> Landing:
        """See `PaymentProvider.look`."""
        status = await self._rpc.call(*_status_question(payout.txid), read=_read_status)
        if status is None:
            expired = await self._rpc.everywhere(partial(_is_expired, payout))
            if all(expired):
                return Landing("lost", reason=f"its blockhash expired after block {payout.nonce}")
            return Landing("waiting", reason="not in a block yet")
        landed = await self._landed(payout.txid) if status.is_final else None
        if landed is None:
            return Landing("waiting", reason="not finalised yet")
        if landed.failed:
            return Landing("failed", landed.fee, "it failed on the chain")
        return Landing("confirmed", landed.fee)

    async def reprice(self, payout: SignedPayout) -> None:
        """See `PaymentProvider.reprice`: a transaction offers no fee here, and one that is not taken expires."""


async def _is_expired(payout: SignedPayout, node: Endpoint) -> bool:
    """Whether a node has finalised its last block without it: asked in this order."""
    height = await node.call("getBlockHeight", _FINALIZED, read=whole)
    if height <= payout.nonce:
        return False
    return await node.call(*_status_question(payout.txid), read=_read_status) is None


def _status_question(txid: str) -> tuple[str, list[str], dict[str, bool]]:
    return "getSignatureStatuses", [txid], {"searchTransactionHistory": True}


def _is_signature(txid: str) -> bool:
    """Base58 of 64 bytes in its one spelling."""
    try:
        raw = base58.b58decode(txid) if txid.isascii() and len(txid) <= _SIGNATURE_CHARS else b""
    except ValueError:
        return False
    return len(raw) == _SIGNATURE_BYTES and base58.b58encode(raw).decode() == txid


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
