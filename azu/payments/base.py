"""What every payment provider can do, and what it returns.

    deposit   a client sends coin to the platform's address and claims the transaction; `verify_deposit` reads it from
              the chain. What is credited is decided by the chain alone: the claim only says where to look.
    payout    `sign_payout` makes a transaction and sends nothing; its bytes are written down; `send` broadcasts them,
              as often as need be, since the same bytes can land once only; `look` tells what became of them; `reprice`
              offers more for one that has become too cheap to land.

Refusals are values. Where no RPC answers a `NetworkError` is raised, whose code says why: "rpc_timeout",
"rpc_rate_limited", "rpc_wrong_chain", "rpc_bad_answer", "rpc_error" or "rpc_unavailable". Nothing is known then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from azu.payments.coin import Coin
from azu.tickets import Refusal

__all__ = ["Deposit", "Landing", "PaymentProvider", "Refusal", "SignedPayout"]


@dataclass(frozen=True, slots=True)
class Deposit:
    """A final transfer from `wallet` to the platform, as the chain has it.

    Args:
        chain: the CAIP-2 name of the chain, such as "eip155:999".
        txid: in its one spelling, so that (chain, txid) is credited once.
        amount: smallest units.
    """

    provider: str
    chain: str
    txid: str
    wallet: str
    amount: int


@dataclass(frozen=True, slots=True)
class SignedPayout:
    """A signed transaction that pays one worker.

    Args:
        raw: its bytes, to be written down before they are sent.
        nonce: what tells that it can land no more: on an EVM its place in the order of the platform's transactions,
            which another one may take; on Solana the last block height at which it is valid.
    """

    txid: str
    raw: bytes
    nonce: int


@dataclass(frozen=True, slots=True)
class Landing:
    """What the chain says of a signed payout.

    waiting     it has not landed for good: send it again, look again
    confirmed   it has paid, for good
    failed      it landed and paid nothing: the payee's account refused it
    lost        every RPC agrees that it has not landed and never can
    """

    state: Literal["waiting", "confirmed", "failed", "lost"]
    fee: int = 0
    reason: str = ""


class PaymentProvider(Protocol):
    """A chain that deposits come from and payouts go to.

    Attributes:
        name: as PAYMENT_PROVIDER has it.
        chain: its CAIP-2 name.
        address: the platform's own, which deposits are sent to and payouts are sent from.
        max_in_flight: payouts that may be under way at once.
    """

    name: str
    chain: str
    coin: Coin
    address: str
    max_in_flight: int

    def read_address(self, text: str) -> str | Refusal:
        """A wallet's address in its one spelling; code "bad_address"."""

    async def verify_deposit(self, txid: str, wallet: str) -> Deposit | Refusal:
        """A claimed deposit, read from the chain.

        Refusals: "bad_txid", "bad_address", "tx_not_found", "tx_pending" (in no block yet), "tx_failed",
        "tx_unconfirmed" (too young to be final), "tx_reorganised" (its block is no longer the chain's), "wrong_chain",
        "wrong_recipient", "wrong_sender", "deposit_too_small".
        """

    async def balance(self, address: str) -> int:
        """What an address has now, in smallest units."""

    async def sign_payout(self, payee: str, amount: int, *, label: str, after: int | None) -> SignedPayout | Refusal:
        """Make the transaction that pays `amount` smallest units to `payee`; nothing is sent.

        Args:
            label: what tells it from every other payout, which the chain may keep beside it.
            after: the highest nonce of the payouts under way, None where there are none.

        Refusals: "bad_address", "bad_amount", "payee_refuses", "platform_short" (the platform's balance does not do).

        Raises:
            InputError: code "no_key", where this process may not pay.
        """

    async def send(self, payout: SignedPayout) -> Refusal | None:
        """Broadcast it, as often as need be. A node's refusal may just mean that it has it: `look` decides."""

    async def look(self, payout: SignedPayout) -> Landing:
        """What became of it."""

    async def reprice(self, payout: SignedPayout) -> SignedPayout | None:
        """Sign one that waits anew, where the chain's fees have risen beyond what it offers; None where they have not.

        Only one of the two can land. Nothing is sent.
        """
