"""Paying workers, so that a crash at any instant pays nobody twice and forgets nobody.

    plan      the ledger sets a worker's earnings aside, and writes down the address of its signed record
    sign      the transaction is made and written down; only then
    send      it is broadcast, again and again until
    look      it has landed for good, or it is certain that it never will

After a crash the ledger says where each payout stands: one that is planned was never sent anywhere, of a signed one the
same bytes are sent again. Two runners at once do no harm: the ledger lets one of them sign.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from azu.errors import NetworkError
from azu.ledger import Ledger, Payout, PayoutState
from azu.ledger import SignedPayout as Signing
from azu.logs import log
from azu.payments.base import Landing, PaymentProvider, Refusal, SignedPayout

__all__ = ["OPEN", "Payouts", "Progress"]

logger = logging.getLogger(__name__)

OPEN: tuple[PayoutState, ...] = ("planned", "signed", "sent")
_MOST_OPEN = 500  # payouts; the ledger lists twice as many
# A worker whose address cannot be paid is not planned for again at once: it has to name another one.
_REFUSED_S = 6 * 3600
# A transaction that waits for so long is looked at for whether it offers too little.
_STUCK_S = 60.0
# RPCs forget: that none knows a transaction proves nothing about one that was signed long ago. Then a person looks.
_CERTAIN_S = 6 * 3600
_NEVER = 2**63 - 1  # the nonce of a transaction that was written down without one: it is never lost


@dataclass(frozen=True, slots=True)
class Progress:
    """What a round came to: who was paid or got the money back, how many payouts are left, and what holds them up."""

    ended: tuple[Payout, ...] = ()
    left: int = 0
    problem: str = ""


class Payouts:
    """Plans and pays by one ledger and one provider.

    Args:
        threshold: smallest units that a worker must be owed before it is paid.
        stuck_s: a transaction that waits for more seconds is signed anew where it offers too little.
    """

    def __init__(self, ledger: Ledger, provider: PaymentProvider, *, threshold: int, stuck_s: float = _STUCK_S) -> None:
        self._ledger = ledger
        self._provider = provider
        self.coin = provider.coin
        self._threshold = max(threshold, 1)
        self._stuck_s = stuck_s

    async def open(self) -> list[Payout]:
        """This provider's payouts that are neither paid nor failed, the oldest first."""
        payouts = await self._ledger.payouts(OPEN)
        return [payout for payout in reversed(payouts) if payout.provider == self._provider.name]

    async def plan(self, payees: Mapping[str, str]) -> list[Payout]:
        """Set aside what each worker is owed, where that is enough and it names an address that can be paid.

        Args:
            payees: the address in each worker's signed record, by peer id.
        """
        owed = await self._ledger.balances("worker")
        due = {peer: amount for peer, amount in owed.items() if amount >= self._threshold and payees.get(peer)}
        if not due:
            return []
        under_way = await self.open()
        refused = await self._refused()
        for payout in under_way:
            due.pop(payout.peer_id, None)
        planned = [
            await self._plan_for(peer, payees[peer], amount, refused)
            for peer, amount in list(due.items())[: max(_MOST_OPEN - len(under_way), 0)]
        ]
        return [payout for payout in planned if payout is not None]

    async def _plan_for(
        self, peer_id: str, payee: str, amount: int, refused: Collection[tuple[str, str]]
    ) -> Payout | None:
        address = self._provider.read_address(payee)
        if isinstance(address, Refusal):
            log(logger, logging.DEBUG, "a worker cannot be paid", peer=peer_id, reason=address.message)
            return None
        if address == self._provider.address or (peer_id, address) in refused:
            return None
        return await self.plan_one(peer_id, address, amount)

    async def plan_one(self, peer_id: str, address: str, amount: int) -> Payout | None:
        """Set an amount aside for a worker; None where it is owed less by now."""
        payout_id = secrets.token_hex(8)
        payout = await self._ledger.payout_plan(payout_id, peer_id, self._provider.name, address, amount)
        if isinstance(payout, Refusal):  # another coordinator was faster
            return None
        log(logger, logging.INFO, "payout planned", payout=payout_id, peer=peer_id, address=address,
            amount=self._provider.coin.format(amount))  # fmt: skip
        return payout

    async def advance(self) -> Progress:
        """Take every open payout as far as it goes now.

        Raises:
            InputError: code "no_key", where this process may not pay.
        """
        ended: list[Payout] = []
        nonces: list[int] = []
        problem = ""
        payouts = await self.open()
        for payout in payouts:
            if payout.state != "planned":
                result = await self._follow(payout)
                ended += [result] if isinstance(result, Payout) else []
                nonces += [] if isinstance(result, Payout) else result
        for payout in payouts:
            if payout.state == "planned" and len(nonces) < self._provider.max_in_flight and not problem:
                begun = await self._begin(payout, max(nonces, default=None))
                if isinstance(begun, Payout):
                    ended.append(begun)
                elif isinstance(begun, int):
                    nonces.append(begun)
                else:
                    problem = begun.message
        return Progress(tuple(ended), len(payouts) - len(ended), problem)

    async def give_up(self, payout_id: str) -> Payout | Refusal | None:
        """Give a worker the money of a payout back that a person has looked for, and that never landed nor will.

        Refusals: "not_lost", where the chain does not agree.
        """
        for signing in await self._ledger.signings(payout_id):
            landing = await self._provider.look(_signed(signing))
            if landing.state != "lost":
                told = f"transaction {signing.txid} is {landing.state}: {landing.reason or 'it has landed'}"
                return Refusal("not_lost", told, "Run azu-coordinator payouts run, which takes it on from there.")
        return await self._failed(payout_id, Landing("lost", reason="an operator found that it never landed"))

    async def _refused(self) -> set[tuple[str, str]]:
        """Workers and addresses that could not be paid lately."""
        since = time.time() - _REFUSED_S
        failed = await self._ledger.payouts(["failed"])
        return {(each.peer_id, each.address) for each in failed
                if each.changed_at > since and not each.reason.startswith("lost")}  # fmt: skip

    async def _follow(self, payout: Payout) -> Payout | list[int]:
        """A signed payout, once it is over; else the nonces that it has taken."""
        signings = await self._ledger.signings(payout.payout_id)
        signed = [_signed(each) for each in signings]
        nonces = [each.nonce for each in signed]
        try:
            landings = [await self._provider.look(each) for each in signed]
            over = await self._settle(payout, signed, landings, signings[-1].signed_at)
            if over is None and any(landing.state == "waiting" for landing in landings):
                is_stuck = time.time() - signings[-1].signed_at > self._stuck_s
                await self._send(payout, (await self._reprice(payout, signed[-1]) if is_stuck else None) or signed[-1])
        except NetworkError as error:
            log(
                logger,
                logging.WARNING,
                "a payout cannot be followed now",
                payout=payout.payout_id,
                reason=error.message,
            )
            return nonces
        return nonces if over is None else over

    async def _reprice(self, payout: Payout, signed: SignedPayout) -> SignedPayout | None:
        """Offer more for one that has become too cheap to land; None where that is not the reason."""
        repriced = await self._provider.reprice(signed)
        if repriced is None:
            return None
        written = await self._ledger.payout_signed([payout.payout_id], repriced.txid, repriced.raw, repriced.nonce)
        if isinstance(written, Refusal):  # another runner has seen it end
            return None
        log(logger, logging.WARNING, "fees have risen: a payout was signed anew", payout=payout.payout_id,
            txid=repriced.txid, replaces=signed.txid)  # fmt: skip
        return repriced

    async def _settle(
        self, payout: Payout, signed: Sequence[SignedPayout], landings: Sequence[Landing], signed_at: int
    ) -> Payout | None:
        """Write down how it ended; None where it has not."""
        for each, landing in zip(signed, landings, strict=True):
            if landing.state == "confirmed":
                return await self._confirmed(payout.payout_id, each.txid, landing)
            if landing.state == "failed":
                return await self._failed(payout.payout_id, landing)
        if any(landing.state == "waiting" for landing in landings):
            return None
        if time.time() - signed_at > _CERTAIN_S:
            log(logger, logging.ERROR, "no RPC knows a payout that was signed long ago", payout=payout.payout_id,
                txid=signed[-1].txid, remedy="If an explorer does not know it: payouts retry ID --lost")  # fmt: skip
            return None
        return await self._failed(payout.payout_id, landings[-1])

    async def _begin(self, payout: Payout, after: int | None) -> Payout | int | Refusal:
        """Sign and send a planned payout: its nonce; the payout itself where it ended at once, or what holds it up."""
        try:
            signed = await self._provider.sign_payout(
                payout.address, payout.amount, label=f"azu payout {payout.payout_id}", after=after
            )
            if isinstance(signed, Refusal):
                return await self._refuse(payout, signed)
            ids = [payout.payout_id]
            written = await self._ledger.payout_signed(ids, signed.txid, signed.raw, signed.nonce, is_first=True)
            if isinstance(written, Refusal):  # another runner is at work: what this one made is forgotten
                return written
            await self._send(payout, signed)
        except NetworkError as error:
            return Refusal(error.code, error.message, error.remedy)
        return signed.nonce

    async def _refuse(self, payout: Payout, refusal: Refusal) -> Payout | Refusal:
        """One that was never signed: the platform must be helped, or the worker."""
        if refusal.code == "platform_short":
            log(logger, logging.WARNING, "payouts wait", reason=refusal.message, remedy=refusal.remedy)
            return refusal
        return await self._failed(payout.payout_id, Landing("failed", reason=refusal.message)) or refusal

    async def _send(self, payout: Payout, signed: SignedPayout) -> None:
        refusal = await self._provider.send(signed)
        if refusal is None:
            await self._ledger.payout_sent([payout.payout_id])
        else:
            log(logger, logging.DEBUG, "a node does not take a payout", txid=signed.txid, reason=refusal.message)

    async def _confirmed(self, payout_id: str, txid: str, landing: Landing) -> Payout | None:
        return await self._ended(payout_id, await self._ledger.payout_confirmed([payout_id], txid, landing.fee))

    async def _failed(self, payout_id: str, landing: Landing) -> Payout | None:
        reason = f"lost: {landing.reason}" if landing.state == "lost" else landing.reason
        return await self._ended(payout_id, await self._ledger.payout_failed([payout_id], reason, fee=landing.fee))

    async def _ended(self, payout_id: str, written: Sequence[Payout] | Refusal) -> Payout | None:
        """The payout as the ledger has it; None where it has ended otherwise before, which the next round sees."""
        if isinstance(written, Refusal):
            log(logger, logging.WARNING, "a payout has ended already", payout=payout_id, reason=written.message)
            return None
        (payout,) = written
        event = "payout paid" if payout.state == "confirmed" else "payout failed"
        log(logger, logging.INFO, event, payout=payout_id, peer=payout.peer_id,
            amount=self._provider.coin.format(payout.amount), txid=payout.txid, reason=payout.reason)  # fmt: skip
        return payout


def _signed(signing: Signing) -> SignedPayout:
    return SignedPayout(signing.txid, signing.raw, _NEVER if signing.nonce is None else signing.nonce)
