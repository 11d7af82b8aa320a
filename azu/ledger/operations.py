"""What deposits and jobs do to the ledger. Pure.

    deposit   chain:<provider>  -> client:<wallet>
    reserve   client:<wallet>   -> reserved:<wallet>
    settle    reserved:<wallet> -> worker:<peer>, held:<peer>, platform; the rest -> client:<wallet>
    release   reserved:<wallet> -> client:<wallet>
    late      platform          -> worker:<peer>, held:<peer>

What a job costs beyond its reservation the platform bears; so it bears all of a job that is settled after its
reservation was released. A job without a reservation can be settled out of `free`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from azu.ledger.accounts import FREE, PLATFORM, chain, client, held, reserved, worker
from azu.ledger.answers import Closed, Deposited, EndedJob, Refusal, Reserved, Shortfall
from azu.ledger.page import Page, Touched, Wanted, row_of

__all__ = ["Deposit", "Release", "Reserve", "Settle"]


@dataclass(frozen=True, slots=True)
class Deposit:
    """Credit a deposit once, whoever claims it again."""

    provider: str
    chain: str
    txid: str
    wallet: str
    amount: int

    def wanted(self) -> Wanted:
        return Wanted(deposits=((self.chain, self.txid),))

    def touched(self, page: Page) -> Touched:
        return Touched((chain(self.provider), client(self.wallet)))

    def decide(self, page: Page) -> Deposited:
        place = (self.chain, self.txid)
        if (known := page.deposits.get(place)) is not None:
            return replace(known, is_new=False)
        moves = ((chain(self.provider), -self.amount), (client(self.wallet), self.amount))
        seq = page.post(f"deposit:{self.chain}:{self.txid}", "deposit", moves)
        deposited = Deposited(self.chain, self.txid, self.wallet, self.amount, is_new=True)
        page.deposits.put(place, deposited)
        page.add("deposits", {**row_of(self), "seq": seq})
        return deposited


@dataclass(frozen=True, slots=True)
class Reserve:
    """Put aside what a job may cost at most."""

    job_id: str
    wallet: str
    amount: int
    key_id: str | None
    owner: str
    expires_at: int

    def wanted(self) -> Wanted:
        return Wanted(jobs=(self.job_id,))

    def touched(self, page: Page) -> Touched:
        return _touched_by(self.wallet, self.key_id)

    def decide(self, page: Page) -> Reserved | Refusal:
        if (known := page.reservations.get(self.job_id)) is not None:
            return known
        if (refusal := self._refusal(page)) is not None:
            return refusal
        moves = ((client(self.wallet), -self.amount), (reserved(self.wallet), self.amount))
        page.post(f"reserve:{self.job_id}", "reserve", moves)
        if self.key_id is not None:
            page.spending.put(self.key_id, page.spent(self.key_id) + self.amount)
        reservation = Reserved(**row_of(self))
        page.reservations.put(self.job_id, reservation)
        return reservation

    def _refusal(self, page: Page) -> Refusal | None:
        if page.closed(self.job_id) is not None:
            return Refusal("job_settled", f"the job {self.job_id} is settled already")
        available = page.balance(client(self.wallet))
        if available < self.amount:
            message = f"the request may cost {self.amount}, and the balance is {available}"
            remedy = "Deposit more, or send a shorter prompt or a smaller max_tokens"
            return Shortfall("insufficient_funds", message, remedy, self.amount, available)
        return None if self.key_id is None else self._beyond_limit(page, self.key_id)

    def _beyond_limit(self, page: Page, key_id: str) -> Refusal | None:
        limit = page.limits.get(key_id)
        if limit is None or isinstance(limit, Refusal):
            return limit
        left = max(limit - page.spent(key_id), 0)
        if left >= self.amount:
            return None
        message = f"the request may cost {self.amount}, and its key may spend {left} more"
        return Shortfall("key_limit", message, "Use a key with a higher limit", self.amount, left)


@dataclass(frozen=True, slots=True)
class Release:
    """Give a job's whole reservation back; one that is closed stays as it is.

    Args:
        owner: the coordinator that asks for it, as in `Settle`.
    """

    job_id: str
    owner: str = ""

    def wanted(self) -> Wanted:
        return Wanted(jobs=(self.job_id,), led=(self.job_id,))

    def touched(self, page: Page) -> Touched:
        return _touched_for(page, self.job_id)

    def decide(self, page: Page) -> Closed | Refusal:
        if (done := page.closed(self.job_id)) is not None:
            return done
        if (refusal := _led_elsewhere(page, self.job_id, self.owner)) is not None:
            return refusal
        reservation = page.reservations.get(self.job_id)
        if reservation is None:
            return _not_reserved(self.job_id)
        moves = ((reserved(reservation.wallet), -reservation.amount), (client(reservation.wallet), reservation.amount))
        page.post(f"close:{self.job_id}", "release", moves)
        return _close(page, reservation, captured=0, is_settled=False)


@dataclass(frozen=True, slots=True)
class Settle:
    """Pay the workers of an ended job, out of its reservation.

    Args:
        is_free: a job without a reservation is paid out of `free`.
        key: the transaction's, where it is not that of the job's only closing; for books kept before this ledger.
        at: when, in unix seconds; now where None.
        owner: the coordinator that asks for it, which has to lead the job still where that outlives its coordinator.
    """

    job: EndedJob
    is_free: bool = False
    key: str | None = None
    at: int | None = None
    owner: str = ""

    def wanted(self) -> Wanted:
        job_id = self.job.job_id
        return Wanted(jobs=(job_id,), transactions=(self.key,) if self.key else (), led=(job_id,))

    def touched(self, page: Page) -> Touched:
        paid = tuple(account for account, _ in self._pay())
        source = _touched_for(page, self.job.job_id)
        return Touched((*paid, FREE, *source.accounts), source.key_ids)

    def decide(self, page: Page) -> Closed | Refusal:
        job = self.job
        if (done := self._done(page)) is not None:
            return done
        if (refusal := _led_elsewhere(page, job.job_id, self.owner)) is not None:
            return refusal
        reservation = page.reservations.get(job.job_id)
        if reservation is None:
            return self._settle_free(page) if self.is_free else _not_reserved(job.job_id)
        if reservation.state == "released":
            return self._settle_late(page, reservation)
        captured = min(job.cost, reservation.amount)
        moves = [
            (reserved(reservation.wallet), -reservation.amount),
            (client(reservation.wallet), reservation.amount - captured),
            (PLATFORM, captured - job.cost),
            *self._pay(),
        ]
        seq = page.post(f"close:{job.job_id}", "settle", moves)
        self._note(page, seq, reservation.wallet, reservation.key_id)
        return _close(page, reservation, captured, is_settled=True)

    def _done(self, page: Page) -> Closed | None:
        """How it was settled before, or closed for good."""
        job_id = self.job.job_id
        if self.key is not None:
            return Closed(job_id, self.job.cost, 0) if self.key in page.known else None
        reservation = page.reservations.get(job_id)
        is_released = reservation is not None and reservation.state == "released"
        return page.settled.get(job_id) if is_released else page.closed(job_id)

    def _settle_free(self, page: Page) -> Closed:
        job = self.job
        seq = page.post(self.key or f"close:{job.job_id}", "settle", [(FREE, -job.cost), *self._pay()], at=self.at)
        self._note(page, seq, job.wallet, job.key_id)
        return self._note_closed(page, captured=job.cost)

    def _settle_late(self, page: Page, reservation: Reserved) -> Closed:
        """What a job's coordinator could not write down before another one had taken it for lost."""
        seq = page.post(f"late:{self.job.job_id}", "settle", [(PLATFORM, -self.job.cost), *self._pay()])
        self._note(page, seq, reservation.wallet, reservation.key_id)
        return self._note_closed(page, captured=0)

    def _note_closed(self, page: Page, captured: int) -> Closed:
        closed = Closed(self.job.job_id, captured, released=0)
        page.settled[closed.job_id] = closed
        return closed

    def _pay(self) -> Iterator[tuple[str, int]]:
        for earning in self.job.earnings:
            account = worker if earning.state == "credited" else held
            yield account(earning.peer_id), earning.earned
        yield PLATFORM, self.job.cost - sum(earning.earned for earning in self.job.earnings)

    def _note(self, page: Page, seq: int, wallet: str, key_id: str | None) -> None:
        job = self.job
        place = {"job_id": job.job_id, "epoch": job.epoch}
        totals = {name: getattr(job, name) for name in ("prompt_tokens", "completion_tokens", "token_layers", "cost")}
        at = page.now if self.at is None else self.at
        who = {"wallet": wallet, "key_id": key_id, "manifest": job.manifest}
        page.add("jobs", {**place, **who, **totals, "settled_at": at, "seq": seq})
        for number, earning in enumerate(job.earnings):
            row = row_of(earning)
            row |= {"first_layer": row.pop("start"), "end_layer": row.pop("end")}
            page.add("stages", {**place, "stage": number, **row})


def _touched_by(wallet: str, key_id: str | None) -> Touched:
    return Touched((client(wallet), reserved(wallet)), () if key_id is None else (key_id,))


def _touched_for(page: Page, job_id: str) -> Touched:
    reservation = page.reservations.get(job_id)  # where it is made on the same page, its maker touches the same
    return Touched() if reservation is None else _touched_by(reservation.wallet, reservation.key_id)


def _close(page: Page, reservation: Reserved, captured: int, *, is_settled: bool) -> Closed:
    state: Literal["settled", "released"] = "settled" if is_settled else "released"
    released = reservation.amount - captured
    page.reservations.put(reservation.job_id, replace(reservation, state=state, captured=captured))
    if reservation.key_id is not None:
        page.spending.put(reservation.key_id, page.spent(reservation.key_id) - released)
    return Closed(reservation.job_id, captured, released)


def _led_elsewhere(page: Page, job_id: str, owner: str) -> Refusal | None:
    """Why a coordinator may not close a job; None where it may."""
    if page.leaders.get(job_id, owner) == owner:
        return None
    return Refusal("led_elsewhere", f"another coordinator leads the job {job_id}")


def _not_reserved(job_id: str) -> Refusal:
    return Refusal("not_reserved", f"nothing is reserved for the job {job_id}")
