"""What goes into the ledger and what comes out of it, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from azu.tickets import Refusal

__all__ = [
    "Closed",
    "Deposited",
    "Earning",
    "EndedJob",
    "Entry",
    "JobUse",
    "KeyLimit",
    "Line",
    "Payout",
    "PayoutState",
    "Refusal",
    "Reserved",
    "Shortfall",
    "SignedPayout",
]

PayoutState = Literal["planned", "signed", "sent", "confirmed", "failed"]
# The most that a key may spend in all its life; None where there is no limit, a Refusal where it may not spend at all.
KeyLimit = int | Refusal | None


@dataclass(frozen=True, slots=True)
class Shortfall(Refusal):
    """A client has less than it needs: code "insufficient_funds", or "key_limit" where only its key has."""

    needed: int = 0
    available: int = 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """What is put aside for a job. `captured` is what it was charged in the end, the rest went back."""

    job_id: str
    wallet: str
    key_id: str | None
    amount: int
    owner: str  # the coordinator that runs the job, by peer id
    expires_at: int
    state: Literal["open", "settled", "released"] = "open"
    captured: int = 0


@dataclass(frozen=True, slots=True)
class Closed:
    """How a job ended: `captured` of its reservation was charged, `released` went back to the client."""

    job_id: str
    captured: int
    released: int


@dataclass(frozen=True, slots=True)
class Deposited:
    """A deposit as it was credited; `is_new` is false where that happened before, perhaps to another wallet."""

    chain: str
    txid: str
    wallet: str
    amount: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class Earning:
    """What one worker did for a job. `earned` is in smallest units; `held` earnings are paid to nobody."""

    peer_id: str
    start: int
    end: int
    tokens: int
    token_layers: int
    earned: int
    state: Literal["credited", "held"]
    receipt: bytes | None = None  # the signed envelope
    reason: str = ""  # why it is held


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job to be settled. Of `cost`, the platform keeps what the workers do not earn.

    `wallet` and `key_id` say who asked for a job that was not reserved; else the reservation does.
    """

    job_id: str
    epoch: int
    manifest: str
    prompt_tokens: int
    completion_tokens: int
    token_layers: int
    cost: int
    earnings: tuple[Earning, ...]
    wallet: str = ""
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class JobUse:
    """A settled job, for the one who asked for it."""

    job_id: str
    manifest: str
    settled_at: int
    prompt_tokens: int
    completion_tokens: int
    token_layers: int
    cost: int
    key_id: str | None


@dataclass(frozen=True, slots=True)
class SignedPayout:
    """A transaction of the chain that was signed for payouts, and may land."""

    txid: str
    raw: bytes
    nonce: int | None
    signed_at: int


@dataclass(frozen=True, slots=True)
class Payout:
    """A payout; `fee` is set once it is confirmed, `reason` once it failed, `txid` is that of its last signing."""

    payout_id: str
    peer_id: str
    provider: str
    address: str
    amount: int
    state: PayoutState
    planned_at: int
    changed_at: int
    txid: str = ""
    fee: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A transaction of the ledger; its postings add up to zero."""

    seq: int
    key: str
    kind: str
    at: int  # unix seconds
    postings: tuple[tuple[str, int], ...]  # account, amount
    digest: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an account's statement."""

    seq: int
    key: str
    kind: str
    at: int
    amount: int
    balance: int  # after it
