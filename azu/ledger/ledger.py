"""The ledger as the coordinator uses it, from trio: every change is one transaction that can be asked for again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from sqlalchemy import Connection

from azu.errors import InternalError
from azu.ledger import reading
from azu.ledger.accounts import check_amount, check_name
from azu.ledger.answers import (
    Closed,
    Deposited,
    EndedJob,
    Entry,
    JobUse,
    Line,
    Payout,
    PayoutState,
    Refusal,
    Reserved,
    SignedPayout,
)
from azu.ledger.database import Database
from azu.ledger.decisions import Decide, HeldEarning, Outcome, find_held
from azu.ledger.operations import Deposit, Release, Reserve, Settle
from azu.ledger.payouts import ConfirmPayouts, FailPayouts, PlanPayout, SendPayouts, SignPayouts
from azu.ledger.store import KeyLimits
from azu.ledger.verifying import Finding, verify
from azu.ledger.writer import Writer

__all__ = ["Ledger"]

T = TypeVar("T")

_READERS = 4  # threads
_MAX_STAGES = 10_000  # of one job; a ticket has 1,000 at most, each of which may be replaced a few times
# A coordinator that has not ended a job so long after its ticket ran out is not coming back to it.
_ABANDONED_S = 86_400


class Ledger:
    """An open ledger; `Ledger.open` makes it.

    Amounts are in the smallest unit of `currency`; `owner` is the coordinator that uses it. Every method that changes
    something may be called again with the same id, and then returns what the first call did. All raise InternalError
    where the database cannot be used, and InputError for amounts and names that cannot be.
    """

    def __init__(self, database: Database, writer: Writer, currency: str, owner: str) -> None:
        self.currency = currency
        self.owner = owner
        self.name = database.name
        self._database = database
        self._writer = writer
        self._readers = trio.CapacityLimiter(_READERS)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str | Path, *, currency: str, owner: str = "", key_limits: KeyLimits | None = None
    ) -> AsyncIterator[Ledger]:
        """Open a ledger, which is made or brought up to date where needed.

        Args:
            url: a file for SQLite, sqlite:///FILE or postgresql://USER@HOST/NAME.
            currency: what its amounts are in, such as "wei", "lamports" or "units".
            owner: the coordinator's peer id, which its reservations carry.
            key_limits: the spending limits of API keys, read in the transaction that reserves.

        Raises:
            InputError: the URL cannot be used, or the ledger is kept in another currency or by a newer azu.
            InternalError: the database cannot be used.
        """
        database = Database(url)
        try:
            await trio.to_thread.run_sync(database.prepare, currency)
            async with Writer(database, key_limits) as writer:
                yield cls(database, writer, currency, owner)
        finally:
            database.close()

    # --- clients

    async def deposit(self, provider: str, chain: str, txid: str, wallet: str, amount: int) -> Deposited:
        """Credit a deposit; its chain and transaction id count once, whoever claims it."""
        for name in (provider, chain, txid):
            check_name(name, "transaction")
        check_name(wallet, "wallet")
        return await self._writer.do(Deposit(provider, chain, txid, wallet, check_amount(amount, least=1)))

    async def reserve(
        self, job_id: str, wallet: str, amount: int, key_id: str | None = None, *, expires_at: int
    ) -> Reserved | Refusal:
        """Put aside what a job may cost at most; a Shortfall says what is missing."""
        check_name(job_id, "job id")
        check_name(wallet, "wallet")
        if key_id is not None:
            check_name(key_id, "key id")
        return await self._writer.do(Reserve(job_id, wallet, check_amount(amount), key_id, self.owner, expires_at))

    async def settle(
        self, job: EndedJob, *, is_free: bool = False, key: str | None = None, at: int | None = None
    ) -> Closed | Refusal:
        """Charge a job for what was delivered, pay its workers, and release the rest.

        Args:
            is_free: pay a job without a reservation out of `free`; else it is refused as "not_reserved". One that
                another coordinator has taken over is refused as "led_elsewhere".
            key, at: for a job of a book kept before this ledger: the transaction's key, and when it was settled.
        """
        _check_job(job)
        return await self._writer.do(Settle(job, is_free, key, at, self.owner))

    async def release(self, job_id: str) -> Closed | Refusal:
        """Give a job's whole reservation back, unless it was settled; "led_elsewhere" as `settle`."""
        return await self._writer.do(Release(job_id, self.owner))

    async def release_abandoned(self) -> list[Closed | Refusal]:
        """Release what this coordinator's jobs of an earlier life hold, and what others gave up a day ago; but for jobs
        that are gone on with.

        For use before the first job is reserved.
        """
        before = int(time.time()) - _ABANDONED_S
        mine = await self.read(partial(reading.open_reservations, owner=self.owner))
        lost = await self.read(partial(reading.open_reservations, expired_before=before))
        kept = await self.read(reading.kept_jobs)
        return [await self.release(job_id) for job_id in {each.job_id for each in (*mine, *lost)} - kept]

    async def balance(self, account: str) -> int:
        """What an account has, by its name (see `azu.ledger.accounts`)."""
        return await self.read(partial(reading.balance, account=account))

    async def balances(self, kind: str) -> dict[str, int]:
        """The accounts of a kind that are not empty, such as "worker", by what comes after the colon."""
        return await self.read(partial(reading.balances, kind=kind))

    async def spent(self, key_id: str) -> int:
        """What was captured and is reserved through an API key."""
        return await self.read(partial(reading.spent, key_id=key_id))

    async def usage(self, wallet: str, since: int = 0, limit: int = 100) -> list[JobUse]:
        """The wallet's latest settled jobs from `since` (unix seconds) on, newest first."""
        return await self.read(partial(reading.usage, wallet=wallet, since=since, limit=limit))

    # --- payouts

    async def payout_plan(
        self, payout_id: str, peer_id: str, provider: str, address: str, amount: int
    ) -> Payout | Refusal:
        """Set a worker's earnings aside to be paid; a Shortfall where it is owed less."""
        for name in (payout_id, peer_id, provider, address):
            check_name(name, "payout")
        return await self._writer.do(PlanPayout(payout_id, peer_id, provider, address, check_amount(amount, least=1)))

    async def payout_signed(
        self, payout_ids: Sequence[str], txid: str, raw: bytes, nonce: int | None = None, *, is_first: bool = False
    ) -> Sequence[Payout] | Refusal:
        """Write down a signed transaction that pays all of these, before it is sent.

        Args:
            is_first: refuse it, code "payout_signed", where another was signed before.
        """
        check_name(txid, "transaction")
        return await self._writer.do(SignPayouts(tuple(payout_ids), txid, raw, nonce, is_first))

    async def payout_sent(self, payout_ids: Sequence[str]) -> Sequence[Payout] | Refusal:
        """Note that a node took the last transaction signed for these."""
        return await self._writer.do(SendPayouts(tuple(payout_ids)))

    async def payout_confirmed(self, payout_ids: Sequence[str], txid: str, fee: int) -> Sequence[Payout] | Refusal:
        """Note that a transaction landed for good, and what it cost in all."""
        return await self._writer.do(ConfirmPayouts(tuple(payout_ids), txid, check_amount(fee)))

    async def payout_failed(
        self, payout_ids: Sequence[str], reason: str, *, fee: int = 0
    ) -> Sequence[Payout] | Refusal:
        """Give the workers back what none of the signed transactions can ever pay any more.

        Args:
            fee: what the chain took for one that landed and paid nothing.
        """
        return await self._writer.do(FailPayouts(tuple(payout_ids), reason[:500], check_amount(fee)))

    async def payouts(self, states: Collection[PayoutState] = (), *, peer_id: str | None = None) -> list[Payout]:
        """The latest payouts in these states (in any where empty), newest first."""
        return await self.read(partial(reading.payouts, states=states, peer_id=peer_id))

    async def signings(self, payout_id: str) -> list[SignedPayout]:
        """The transactions that were signed for a payout, the latest last."""
        return await self.read(partial(reading.signings, payout_id=payout_id))

    # --- earnings in dispute

    async def held(
        self, *, peer_id: str | None = None, job_id: str | None = None, is_undecided: bool = False
    ) -> Sequence[HeldEarning]:
        """The latest held earnings: all, one worker's, one job's, or those that nobody has decided on."""
        return await self.read(partial(find_held, peer_id=peer_id, job_id=job_id, is_undecided=is_undecided))

    async def decide(self, job_id: str, epoch: int, stage: int, outcome: Outcome) -> Outcome | Refusal:
        """Pay held earnings to their worker, or give them back to the client. A decision is final."""
        found = await self.read(partial(find_held, job_id=job_id, limit=None))
        earning = next((each for each in found if (each.epoch, each.stage) == (epoch, stage)), None)
        if earning is None:
            return Refusal("not_held", f"nothing is held of stage {stage} of job {job_id}")
        if earning.outcome == outcome:
            return outcome
        return await self._writer.do(Decide(earning, outcome))

    # --- the books

    async def verify(self) -> list[Finding]:
        """What does not add up; nothing where all is well."""
        return await self.read(verify)

    async def export(self) -> list[Entry]:
        """All transactions with their postings; the command streams them instead."""
        return await self.read(lambda connection: list(reading.entries(connection)))

    async def statement(self, account: str, since: int = 0) -> list[Line]:
        """What moved on an account from `since` (unix seconds) on."""
        return await self.read(partial(reading.statement, account=account, since=since))

    # --- other tables of the same database

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run queries on one consistent state, in a thread."""
        return await trio.to_thread.run_sync(self._database.read, work, limiter=self._readers)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run statements in a transaction of their own, in the writing thread.

        They are run again where the database asks for that, or where the connection was lost and they may have been
        committed or not. Tables of the ledger itself are not for them to change.
        """
        return await self._writer.do(work)


def _check_job(job: EndedJob) -> None:
    check_name(job.job_id, "job id")
    check_amount(job.cost)
    for earning in job.earnings:
        check_name(earning.peer_id, "peer id")
        check_amount(earning.earned)
    if len(job.earnings) > _MAX_STAGES or sum(earning.earned for earning in job.earnings) > job.cost:
        raise InternalError(f"the workers of job {job.job_id} would earn more than it costs", code="ledger_unbalanced")
