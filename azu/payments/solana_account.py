"""A Solana private key, and the transactions that it pays with."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SolanaAccount", "solana_account"]

_MEMO_PROGRAM = "MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr"


class SolanaAccount(Protocol):
    """A private key at work."""

    address: str

    def pay(self, payee: str, amount: int, label: str, blockhash: str) -> tuple[str, bytes, bytes]:
        """A payout's signature, its message and its bytes."""


def solana_account(seed: bytes) -> SolanaAccount:
    """The account of an Ed25519 seed."""
    from solders.hash import Hash
    from solders.instruction import Instruction
    from solders.keypair import Keypair
    from solders.message import Message
    from solders.pubkey import Pubkey
    from solders.system_program import TransferParams, transfer
    from solders.transaction import Transaction

    pair = Keypair.from_seed(seed)
    me, memo = pair.pubkey(), Pubkey.from_string(_MEMO_PROGRAM)

    class _Account:
        address = str(me)

        def pay(self, payee: str, amount: int, label: str, blockhash: str) -> tuple[str, bytes, bytes]:
            recent = Hash.from_string(blockhash)
            move = transfer(TransferParams(from_pubkey=me, to_pubkey=Pubkey.from_string(payee), lamports=amount))
            # Without a memo two payouts of one amount to one worker would be one transaction.
            message = Message.new_with_blockhash([move, Instruction(memo, label.encode(), [])], me, recent)
            signed = Transaction([pair], message, recent)
            return str(signed.signatures[0]), bytes(message), bytes(signed)

    return _Account()
