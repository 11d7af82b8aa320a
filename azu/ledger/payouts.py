"""What payouts do to the ledger. Pure.

    planned ──► signed ⇄ sent ──► confirmed     worker -> paying at planned
       │           │       │                    paying -> chain at confirmed, with the fee fees -> chain
       └───────────┴───────┴────► failed        paying -> worker at failed

A chain's transaction is written down with its id before it is sent, so that after a crash the same one is sent again.
It may pay several payouts at once, and a payout may be signed several times where only one of the transactions can land
(they spend the same nonce). `failed` is for when it is certain that none of them ever lands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from azu.ledger.accounts import FEES, chain, paying, worker
from azu.ledger.answers import Payout, PayoutState, Refusal, Shortfall
from azu.ledger.page import Page, Touched, Wanted

__all__ = ["ConfirmPayouts", "FailPayouts", "PlanPayout", "SendPayouts", "SignPayouts"]

_OPEN: tuple[PayoutState, ...] = ("planned", "signed", "sent")
_SIGNED: tuple[PayoutState, ...] = ("signed", "sent")


@dataclass(frozen=True, slots=True)
class PlanPayout:
    """Set a worker's earnings aside to be paid."""

    payout_id: str
    peer_id: str
    provider: str
    address: str
    amount: int

    def wanted(self) -> Wanted:
        return Wanted(payouts=(self.payout_id,))

    def touched(self, page: Page) -> Touched:
        return Touched((worker(self.peer_id), paying(self.peer_id)))

    def decide(self, page: Page) -> Payout | Refusal:
        if (known := page.payouts.get(self.payout_id)) is not None:
            return known
        available = page.balance(worker(self.peer_id))
        if available < self.amount:
            message = f"{self.peer_id} is owed {available}, less than {self.amount}"
            return Shortfall("insufficient_funds", message, "", self.amount, available)
        moves = ((worker(self.peer_id), -self.amount), (paying(self.peer_id), self.amount))
        page.post(f"payout:{self.payout_id}:planned", "payout planned", moves)
        payout = Payout(
            self.payout_id, self.peer_id, self.provider, self.address, self.amount, "planned", page.now, page.now
        )
        page.payouts.put(self.payout_id, payout)
        return payout


@dataclass(frozen=True, slots=True)
class _OfPayouts:
    """A step that several payouts take together, or none of them."""

    payout_ids: tuple[str, ...]

    def wanted(self) -> Wanted:
        return Wanted(payouts=self.payout_ids)

    def touched(self, page: Page) -> Touched:
        return Touched(tuple(account for payout in self._known(page) for account in _accounts(payout)))

    def _known(self, page: Page) -> Iterator[Payout]:
        found = (page.payouts.get(payout_id) for payout_id in self.payout_ids)
        return (payout for payout in found if payout is not None)

    def _checked(self, page: Page, *allowed: PayoutState) -> list[Payout] | Refusal:
        """The payouts, which all have to be in one of the states."""
        payouts = list(self._known(page))
        if len(payouts) < len(self.payout_ids):
            return Refusal("no_such_payout", "a payout of these is not planned")
        for payout in payouts:
            if payout.state not in allowed:
                return Refusal("payout_state", f"the payout {payout.payout_id} is {payout.state} already")
        return payouts


@dataclass(frozen=True, slots=True)
class SignPayouts(_OfPayouts):
    """Write a signed transaction down before it is sent.

    Where `is_first`, it is refused once another was signed: of two runners that sign one payout with two nonces, one
    comes too late.
    """

    txid: str
    raw: bytes
    nonce: int | None
    is_first: bool = False

    def decide(self, page: Page) -> Sequence[Payout] | Refusal:
        payouts = self._checked(page, *_OPEN)
        if isinstance(payouts, Refusal):
            return payouts
        if self.is_first and any({*page.signings.get(payout.payout_id, ())} - {self.txid} for payout in payouts):
            return Refusal("payout_signed", "another transaction was signed for a payout of these")
        for payout in payouts:
            signings = page.signings.setdefault(payout.payout_id, [])
            if self.txid in signings:
                continue
            what = {"txid": self.txid, "raw": self.raw, "nonce": self.nonce, "signed_at": page.now}
            page.add("payout_transactions", {"payout_id": payout.payout_id, "number": len(signings), **what})
            signings.append(self.txid)
            _move_on(page, payout, state="signed", txid=self.txid)
        return list(self._known(page))


@dataclass(frozen=True, slots=True)
class SendPayouts(_OfPayouts):
    """Note that a node took their last transaction."""

    def decide(self, page: Page) -> Sequence[Payout] | Refusal:
        payouts = self._checked(page, *_SIGNED)
        if isinstance(payouts, Refusal):
            return payouts
        for payout in payouts:
            if payout.state != "sent":
                _move_on(page, payout, state="sent")
        return list(self._known(page))


@dataclass(frozen=True, slots=True)
class ConfirmPayouts(_OfPayouts):
    """Note that a transaction landed for good; its whole `fee` is shared among them, the remainder to the first."""

    txid: str
    fee: int

    def decide(self, page: Page) -> Sequence[Payout] | Refusal:
        payouts = self._checked(page, *_SIGNED, "confirmed")
        if isinstance(payouts, Refusal):
            return payouts
        if any(self.txid not in page.signings.get(payout.payout_id, ()) for payout in payouts):
            return Refusal("not_signed", f"the transaction {self.txid} was not signed for these payouts")
        share, remainder = divmod(self.fee, len(payouts))
        for number, payout in enumerate(payouts):
            if payout.state != "confirmed":
                self._confirm(page, payout, share + (remainder if number == 0 else 0))
        return list(self._known(page))

    def _confirm(self, page: Page, payout: Payout, fee: int) -> None:
        coin = chain(payout.provider)
        moves = ((paying(payout.peer_id), -payout.amount), (FEES, -fee), (coin, payout.amount + fee))
        page.post(f"payout:{payout.payout_id}:confirmed", "payout confirmed", moves)
        _move_on(page, payout, state="confirmed", txid=self.txid, fee=fee)


@dataclass(frozen=True, slots=True)
class FailPayouts(_OfPayouts):
    """Give the workers back what can never be paid by these payouts any more.

    A transaction that landed and paid nothing has cost its `fee` all the same, which is shared as a confirmed one's.
    """

    reason: str
    fee: int = 0

    def decide(self, page: Page) -> Sequence[Payout] | Refusal:
        payouts = self._checked(page, *_OPEN, "failed")
        if isinstance(payouts, Refusal):
            return payouts
        share, remainder = divmod(self.fee, len(payouts))
        for number, payout in enumerate(payouts):
            if payout.state != "failed":
                self._fail(page, payout, share + (remainder if number == 0 else 0))
        return list(self._known(page))

    def _fail(self, page: Page, payout: Payout, fee: int) -> None:
        back = ((paying(payout.peer_id), -payout.amount), (worker(payout.peer_id), payout.amount))
        taken = ((FEES, -fee), (chain(payout.provider), fee)) if fee else ()
        page.post(f"payout:{payout.payout_id}:failed", "payout failed", (*back, *taken))
        _move_on(page, payout, state="failed", reason=self.reason, fee=fee)


def _accounts(payout: Payout) -> tuple[str, ...]:
    return worker(payout.peer_id), paying(payout.peer_id), chain(payout.provider), FEES


def _move_on(page: Page, payout: Payout, **changes: object) -> None:
    page.payouts.put(payout.payout_id, replace(payout, changed_at=page.now, **changes))  # type: ignore[arg-type]
