"""Deposits and payouts in HYPE on HyperEVM: plain transfers of an EVM chain with EIP-1559 fees and 1 s blocks.

Only what a transaction itself carries counts as a deposit (its sender, its recipient, its value): what a contract
passes on does not, and neither do HyperCore's system transactions, which nobody has signed. State can be read at the
latest block only. The priority fee would be burnt, so none is offered. A node takes the next 8 nonces of an address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from azu.errors import InputError
from azu.payments.addresses import check_evm_address
from azu.payments.answers import digest, optional, quantity, record, text
from azu.payments.base import Deposit, Landing, Refusal, SignedPayout
from azu.payments.coin import HYPE, LARGEST_AMOUNT
from azu.payments.evm_account import EvmAccount
from azu.payments.keys import no_key
from azu.payments.rpc import ChainCheck, Endpoint, Rpc, RpcError

__all__ = ["Hyperliquid", "chain_check"]

_TXID = re.compile(r"0x[0-9a-fA-F]{64}", re.ASCII)
_PLAIN_GAS = 21_000
# A contract wallet may run a little code when it is paid; more than this is not paid for.
_MOST_GAS = 60_000
# The base fee rises by an eighth per full block: this covers 17 of them. Only the base fee itself is taken.
_FEE_ROOM = 8


def chain_check(chain_id: int) -> ChainCheck:
    """What an RPC of the chain answers."""
    return ChainCheck("eth_chainId", hex(chain_id), f"chain id {chain_id}")


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A transaction as a node tells it; `block` and `block_hash` are None while it is in none."""

    txid: str
    chain_id: int | None
    sender: str
    recipient: str
    value: int
    block: int | None
    block_hash: str | None


@dataclass(frozen=True, slots=True)
class _Receipt:
    txid: str
    status: int
    block: int
    block_hash: str
    fee: int


def _read_transfer(value: object) -> _Transfer:
    fields = record(value)
    recipient = optional(text)(fields.get("to"))  # null where it makes a contract
    return _Transfer(
        txid=digest(fields.get("hash")),
        chain_id=optional(quantity)(fields.get("chainId")),
        sender=text(fields.get("from")).lower(),
        recipient=(recipient or "").lower(),
        value=quantity(fields.get("value")),
        block=optional(quantity)(fields.get("blockNumber")),
        block_hash=optional(digest)(fields.get("blockHash")),
    )


def _read_receipt(value: object) -> _Receipt:
    fields = record(value)
    return _Receipt(
        txid=digest(fields.get("transactionHash")),
        status=quantity(fields.get("status")),
        block=quantity(fields.get("blockNumber")),
        block_hash=digest(fields.get("blockHash")),
        fee=quantity(fields.get("gasUsed")) * quantity(fields.get("effectiveGasPrice")),
    )


def _read_block_hash(value: object) -> str:
    return digest(record(value).get("hash"))


def _read_base_fee(value: object) -> int:
    return quantity(record(value).get("baseFeePerGas"))


class Hyperliquid:
    """The provider of one platform address; see `azu.payments.base.PaymentProvider`.

    Args:
        address: with its checksum.
        account: of that address; None where this process may not pay.
        confirmations: blocks, its own included, after which a transaction is final.
        min_deposit: wei.
    """

    name = "hyperliquid"
    coin = HYPE
    max_in_flight = 8

    def __init__(
        self,
        rpc: Rpc,
        *,
        chain_id: int,
        address: str,
        account: EvmAccount | None,
        confirmations: int,
        min_deposit: int,
    ) -> None:
        self.chain = f"eip155:{chain_id}"
        self.address = address
        self._rpc = rpc
        self._chain_id = chain_id
        self._account = account
        self._confirmations = confirmations
        self._min_deposit = min_deposit
        self._passed_at: dict[str, int] = {}  # payout's txid -> head when its nonce was first seen used without it

    def read_address(self, text: str) -> str | Refusal:
        """An address with its checksum."""
        try:
            return check_evm_address(text)
        except InputError as error:
            return Refusal(error.code, error.message, error.remedy)

    async def balance(self, address: str) -> int:
        """Wei at the latest block."""
        return await self._rpc.call("eth_getBalance", address, "latest", read=quantity)

    # --- deposits ---

    async def verify_deposit(self, txid: str, wallet: str) -> Deposit | Refusal:
        """See `PaymentProvider.verify_deposit`."""
        if not _TXID.fullmatch(txid):
            return Refusal("bad_txid", f"{txid[:80]!r} is no transaction hash", "It has 0x and 64 hexadecimal digits.")
        txid = txid.lower()
        sender = self.read_address(wallet)
        if isinstance(sender, Refusal):
            return sender
        transfer = await self._rpc.call("eth_getTransactionByHash", txid, read=optional(_read_transfer))
        if transfer is None or transfer.txid != txid:
            remedy = f"Check its hash, and that it was sent on chain id {self._chain_id}."
            return Refusal("tx_not_found", f"the chain knows no transaction {txid}", remedy)
        refusal = self._check_terms(transfer, sender) or await self._check_block(transfer)
        return refusal or Deposit(self.name, self.chain, txid, sender, transfer.value)

    def _check_terms(self, transfer: _Transfer, wallet: str) -> Refusal | None:
        """What it says, wherever it lies."""
        if transfer.chain_id not in (None, self._chain_id):
            told = f"the transaction is for chain id {transfer.chain_id}, not {self._chain_id}"
            return Refusal("wrong_chain", told, "Send on the chain that the coordinator takes deposits on.")
        if transfer.recipient != self.address.lower():
            told = f"the transaction pays {transfer.recipient or 'nobody'}, not {self.address}"
            return Refusal("wrong_recipient", told, f"Send {HYPE.symbol} to {self.address} itself, not to a contract.")
        if transfer.sender != wallet.lower() or transfer.sender == transfer.recipient:
            told = f"the transaction was sent by {transfer.sender}, not by {wallet}"
            return Refusal("wrong_sender", told, "A deposit counts for the wallet that sent it: sign in with that one.")
        if transfer.value < max(self._min_deposit, 1):
            told = f"the transaction pays {HYPE.format(transfer.value)}"
            return Refusal("deposit_too_small", told, f"The least that is taken is {HYPE.format(self._min_deposit)}.")
        return None

    async def _check_block(self, transfer: _Transfer) -> Refusal | None:
        """Whether it has happened, for good."""
        if transfer.block is None or transfer.block_hash is None:
            return _pending(transfer.txid)
        receipt = await self._rpc.call("eth_getTransactionReceipt", transfer.txid, read=optional(_read_receipt))
        if receipt is None or receipt.txid != transfer.txid:
            return _pending(transfer.txid)
        if receipt.status != 1:
            told = f"transaction {transfer.txid} failed on the chain and moved nothing"
            return Refusal("tx_failed", told, "Send it again.")
        depth = await self._depth(receipt)
        if receipt.block_hash != transfer.block_hash or depth is None:
            told = f"the block of transaction {transfer.txid} is no longer part of the chain"
            return Refusal("tx_reorganised", told, "Wait until the chain has it again, and claim it then.")
        if depth < self._confirmations:
            told = f"transaction {transfer.txid} has {depth} of {self._confirmations} confirmations"
            return Refusal("tx_unconfirmed", told, "Claim it again in some seconds.")
        return None

    async def _depth(self, receipt: _Receipt) -> int | None:
        """Confirmations of a receipt's block, whose hash is read again; None where it is another one now."""
        head = await self._rpc.call("eth_blockNumber", read=quantity)
        now = await self._rpc.call("eth_getBlockByNumber", hex(receipt.block), False, read=optional(_read_block_hash))
        return max(head - receipt.block + 1, 0) if now == receipt.block_hash else None

    # --- payouts ---

    async def sign_payout(self, payee: str, amount: int, *, label: str, after: int | None) -> SignedPayout | Refusal:
        """See `PaymentProvider.sign_payout`.

        Raises:
            InputError: code "no_key", where this process may not pay.
        """
        if self._account is None:
            raise no_key()
        to = self.read_address(payee)
        if isinstance(to, Refusal):
            return to
        if not 0 < amount <= LARGEST_AMOUNT:
            return Refusal("bad_amount", f"{amount} wei cannot be paid")
        base_fee = await self._base_fee()
        gas = await self._gas(to, amount, base_fee * _FEE_ROOM)
        if isinstance(gas, Refusal):
            return gas
        count = await self._rpc.call("eth_getTransactionCount", self.address, "latest", read=quantity)
        nonce = count if after is None else max(count, after + 1)
        fields: dict[str, object] = {
            "type": 2, "chainId": self._chain_id, "nonce": nonce, "to": to, "value": amount, "gas": gas,
            "maxFeePerGas": base_fee * _FEE_ROOM, "maxPriorityFeePerGas": 0,
        }  # fmt: skip
        txid, raw = self._account.sign(fields)
        return SignedPayout(txid, raw, nonce)

    async def _gas(self, to: str, amount: int, fee: int) -> int | Refusal:
        """The gas that paying takes; the platform must be able to pay for it at `fee` wei each."""
        short = await self.balance(self.address) - amount - _PLAIN_GAS * fee
        if short < 0:
            told = f"the platform's {self.address} lacks {HYPE.format(-short)} for this payout and its fee"
            return Refusal("platform_short", told, f"Send {HYPE.symbol} to it.")
        question = {"from": self.address, "to": to, "value": hex(amount)}
        try:
            gas = await self._rpc.call("eth_estimateGas", question, read=quantity)
        except RpcError as error:
            return Refusal(
                "payee_refuses", f"{to} cannot be paid: {error.reply}", "The worker has to name another address."
            )
        if gas > _MOST_GAS:
            told = f"paying {to} takes {gas} gas, more than {_MOST_GAS}"
            return Refusal("payee_refuses", told, "The worker has to name an address that is no contract.")
        return gas if gas == _PLAIN_GAS else min(gas * 13 // 10, _MOST_GAS)

    async def send(self, payout: SignedPayout) -> Refusal | None:
        """See `PaymentProvider.send`; a node that has it already says so in an error, which is no matter."""
        try:
            await self._rpc.call("eth_sendRawTransaction", f"0x{payout.raw.hex()}", read=digest)
        except RpcError as error:
            return Refusal("not_taken", error.message)
        return None

    async def look(self, payout: SignedPayout) -> Landing:
        """See `PaymentProvider.look`."""
        receipt = await self._rpc.call("eth_getTransactionReceipt", payout.txid, read=optional(_read_receipt))
        if receipt is None or receipt.txid != payout.txid:
            return await self._look_for_rival(payout)
        depth = await self._depth(receipt)
        if depth is None or depth < self._confirmations:
            return Landing("waiting", reason=f"{depth or 0} of {self._confirmations} confirmations")
        if receipt.status != 1:
            return Landing("failed", receipt.fee, "the payee's account refused it")
        return Landing("confirmed", receipt.fee)

    async def reprice(self, payout: SignedPayout) -> SignedPayout | None:
        """See `PaymentProvider.reprice`: the same transfer with the same nonce."""
        if self._account is None or not self._account.has_made(payout.raw, self._chain_id):
            return None
        base_fee = await self._base_fee()
        if base_fee <= self._account.offer(payout.raw):
            return None
        return SignedPayout(*self._account.reprice(payout.raw, base_fee * _FEE_ROOM), payout.nonce)

    async def _base_fee(self) -> int:
        return await self._rpc.call("eth_getBlockByNumber", "latest", False, read=_read_base_fee)

    async def _look_for_rival(self, payout: SignedPayout) -> Landing:
        """Whether another transaction has its nonce: on every RPC, twice, with confirmations between."""
        if self._account is None or not self._account.has_made(payout.raw, self._chain_id):
            return Landing("waiting", reason="another key signed it, or for another chain: look with that one")
        passed = await self._rpc.everywhere(partial(self._is_passed, payout))
        if not all(passed):
            self._passed_at.pop(payout.txid, None)
            return Landing("waiting", reason="not in a block yet")
        head = await self._rpc.call("eth_blockNumber", read=quantity)
        first = self._passed_at.setdefault(payout.txid, head)
        if head < first + self._confirmations:
            return Landing("waiting", reason=f"nonce {payout.nonce} was used by another transaction, perhaps")
        return Landing("lost", reason=f"nonce {payout.nonce} was used by another transaction")

    async def _is_passed(self, payout: SignedPayout, node: Endpoint) -> bool:
        """Whether a node has a later nonce of ours, and not this transaction: asked in this order."""
        count = await node.call("eth_getTransactionCount", self.address, "latest", read=quantity)
        if count <= payout.nonce:
            return False
        transfer = await node.call("eth_getTransactionByHash", payout.txid, read=optional(_read_transfer))
        receipt = await node.call("eth_getTransactionReceipt", payout.txid, read=optional(_read_receipt))
        return receipt is None and (transfer is None or transfer.block is None)


def _pending(txid: str) -> Refusal:
    return Refusal("tx_pending", f"transaction {txid} is in no block yet", "Claim it again in some seconds.")
