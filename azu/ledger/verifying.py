"""Does the ledger add up? Everything that is kept twice is compared, and every digest is computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import LABEL_STYLE_TABLENAME_PLUS_COL, Connection, Row, select

from azu.ledger import reading, schema
from azu.ledger.accounts import (
    FEES,
    FREE,
    PLATFORM,
    chain,
    client,
    held,
    kind_of,
    may_be_negative,
    paying,
    reserved,
    worker,
)
from azu.ledger.answers import Entry
from azu.ledger.decisions import find_held
from azu.ledger.digests import GENESIS, digest_of

__all__ = ["Finding", "verify"]

_CHUNK = 1000  # rows that are read at once
_RESERVED = ("amount", "captured", "state")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not add up."""

    where: str
    what: str


def verify(connection: Connection) -> list[Finding]:
    """Check the whole ledger, by reading all of it; nothing is found where all is well."""
    book = _Book()
    found = [
        *_check_chain(connection, book),
        *_check_balances(connection, book),
        *_check_reservations(connection, book),
        *_check_deposits(connection, book),
        *_check_jobs(connection, book),
        *_check_decisions(connection, book),
        *_check_keys(connection, book),
        *_check_payouts(connection, book),
    ]
    return [*found, *(Finding(key, "nothing tells what this transaction was for") for key in book.unclaimed())]


class _Book:
    """What the transactions say, for everything else to be compared with."""

    def __init__(self) -> None:
        self.balances: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()  # by API key
        self._moves: dict[str, int] = {}  # their hashes: there may be millions

    def add(self, entry: Entry) -> None:
        self._moves[entry.key] = hash(frozenset(entry.postings))
        for account, amount in entry.postings:
            self.balances[account] += amount

    def claim(self, key: str, *moves: tuple[str, int]) -> Iterator[Finding]:
        """Compare a transaction with what it has to be."""
        expected: Counter[str] = Counter()
        for account, amount in moves:
            expected[account] += amount
        found = self._moves.pop(key, None)
        if found is None:
            yield Finding(key, "the transaction is missing")
        elif found != hash(frozenset(each for each in expected.items() if each[1])):
            yield Finding(key, "the postings are not those that it has to have")

    def unclaimed(self) -> Iterator[str]:
        return iter(self._moves)


def _check_chain(connection: Connection, book: _Book) -> Iterator[Finding]:
    digest, seq = GENESIS, 0
    is_broken = False
    for entry in reading.entries(connection):
        seq += 1
        where = f"transaction {entry.seq}"
        if entry.seq != seq:
            yield Finding(where, f"transaction {seq} is missing before it")
            seq = entry.seq
        if sum(amount for _, amount in entry.postings):
            yield Finding(where, "its postings do not add up to zero")
        digest = digest_of(digest, entry.seq, entry.key, entry.kind, entry.at, entry.postings)
        if digest.hex() != entry.digest and not is_broken:
            yield Finding(where, "its digest is another: it, or one before it, was changed")
        is_broken = digest.hex() != entry.digest
        digest = bytes.fromhex(entry.digest)
        book.add(entry)
    head = connection.execute(select(schema.head)).one_or_none()
    if head is None or (head.seq, head.digest) != (seq, digest):
        yield Finding("head", f"it does not name transaction {seq} and its digest as the last: some are missing")


def _check_balances(connection: Connection, book: _Book) -> Iterator[Finding]:
    kept = {row.account: row for row in connection.execute(select(schema.balances))}
    for account in sorted(kept.keys() | book.balances.keys()):
        derived, row = book.balances[account], kept.get(account)
        if (row.balance if row else 0) != derived:
            yield Finding(account, f"the balance is {row.balance if row else 0}, its postings add up to {derived}")
        if row is not None and row.kind != kind_of(account):
            yield Finding(account, "its kind is another")
        if derived < 0 and not may_be_negative(account):
            yield Finding(account, f"it is below zero: {derived}")


def _check_reservations(connection: Connection, book: _Book) -> Iterator[Finding]:
    reserved_sums: Counter[str] = Counter()
    for row in connection.execute(select(schema.reservations)):
        place, mine = reserved(row.wallet), client(row.wallet)
        yield from book.claim(f"reserve:{row.job_id}", (mine, -row.amount), (place, row.amount))
        if row.state == "open":
            reserved_sums[place] += row.amount
        elif row.state == "released":
            yield from book.claim(f"close:{row.job_id}", (place, -row.amount), (mine, row.amount))
        if row.key_id is not None:
            book.spent[row.key_id] += row.amount if row.state == "open" else row.captured
        if not 0 <= row.captured <= row.amount or (row.captured and row.state != "settled"):
            yield Finding(f"reservation {row.job_id}", f"{row.captured} of {row.amount} is captured")
    for account in {name for name in book.balances if kind_of(name) == "reserved"} | reserved_sums.keys():
        if book.balances[account] != reserved_sums[account]:
            yield Finding(account, f"open reservations are {reserved_sums[account]}, it has {book.balances[account]}")


def _check_deposits(connection: Connection, book: _Book) -> Iterator[Finding]:
    for row in connection.execute(select(schema.deposits)):
        moves = (chain(row.provider), -row.amount), (client(row.wallet), row.amount)
        yield from book.claim(f"deposit:{row.chain}:{row.txid}", *moves)


def _check_jobs(connection: Connection, book: _Book) -> Iterator[Finding]:
    jobs, stages, reservations = schema.jobs, schema.stages, schema.reservations
    of_job = (stages.c.job_id == jobs.c.job_id) & (stages.c.epoch == jobs.c.epoch)
    query = (
        select(jobs, schema.transactions.c.key, stages, *(reservations.c[name] for name in _RESERVED))
        .outerjoin(schema.transactions, schema.transactions.c.seq == jobs.c.seq)
        .outerjoin(stages, of_job)
        .outerjoin(reservations, reservations.c.job_id == jobs.c.job_id)
        .order_by(jobs.c.job_id, jobs.c.epoch, stages.c.stage)
        .set_label_style(LABEL_STYLE_TABLENAME_PLUS_COL)
    )
    rows = connection.execute(query, execution_options={"yield_per": _CHUNK})
    for _, group in groupby(rows, key=lambda row: (row.jobs_job_id, row.jobs_epoch)):
        yield from _check_job(list(group), book)
    has_job = select(jobs.c.job_id).where(jobs.c.job_id == reservations.c.job_id).exists()
    lost = select(reservations.c.job_id).where(reservations.c.state == "settled", ~has_job)
    for job_id in connection.execute(lost).scalars():
        yield Finding(f"job {job_id}", "its reservation is settled, and the job is missing")
    for job_id in connection.execute(
        select(stages.c.job_id).outerjoin(jobs, of_job).where(jobs.c.seq.is_(None))
    ).scalars():
        yield Finding(f"job {job_id}", "its stages are there, and the job is missing")


def _check_job(rows: list[Row[Any]], book: _Book) -> Iterator[Finding]:
    """One job, with a row for each of its stages."""
    job = rows[0]
    where, key = f"job {job.jobs_job_id}", job.transactions_key or f"close:{job.jobs_job_id}"
    shares: list[tuple[str, int]] = []
    for row in rows:
        if row.stages_job_id is not None:
            account = worker if row.stages_state == "credited" else held
            shares.append((account(row.stages_peer_id), row.stages_earned))
            if row.stages_token_layers != row.stages_tokens * (row.stages_end_layer - row.stages_first_layer):
                yield Finding(where, f"stage {row.stages_stage} has {row.stages_token_layers} token-layers")
    shares.append((PLATFORM, job.jobs_cost - sum(amount for _, amount in shares)))
    amount, captured = job.reservations_amount, job.reservations_captured
    if key == f"late:{job.jobs_job_id}":
        yield from book.claim(key, (PLATFORM, -job.jobs_cost), *shares)
        if job.reservations_state != "released":
            yield Finding(where, "it is settled late, and its reservation was not released")
        return
    if amount is None or key != f"close:{job.jobs_job_id}":
        yield from book.claim(key, (FREE, -job.jobs_cost), *shares)
        return
    source = [(reserved(job.jobs_wallet), -amount), (client(job.jobs_wallet), amount - captured)]
    yield from book.claim(key, *source, (PLATFORM, captured - job.jobs_cost), *shares)
    if job.reservations_state != "settled" or captured != min(job.jobs_cost, amount):
        yield Finding(where, "it is settled, and its reservation says otherwise")


def _check_decisions(connection: Connection, book: _Book) -> Iterator[Finding]:
    """That what was decided moved what was held; whose key is no held stage's stays unclaimed."""
    for earning in find_held(connection, limit=None):
        if earning.outcome is not None:
            yield from book.claim(earning.key, *earning.moves(earning.outcome))
        if earning.outcome == "client" and earning.key_id is not None:
            book.spent[earning.key_id] -= earning.refund


def _check_keys(connection: Connection, book: _Book) -> Iterator[Finding]:
    """After all that lets keys spend, or gives back what they spent."""
    kept = {row.key_id: row.spent for row in connection.execute(select(schema.key_spending))}
    for key_id in sorted(kept.keys() | book.spent.keys()):
        if kept.get(key_id, 0) != book.spent[key_id]:
            yield Finding(f"key {key_id}", f"it has spent {book.spent[key_id]}, not {kept.get(key_id, 0)}")


def _check_payouts(connection: Connection, book: _Book) -> Iterator[Finding]:
    under_way: Counter[str] = Counter()
    for row in connection.execute(select(schema.payouts)):
        own, aside, key = worker(row.peer_id), paying(row.peer_id), f"payout:{row.payout_id}"
        yield from book.claim(f"{key}:planned", (own, -row.amount), (aside, row.amount))
        if row.state == "confirmed":
            coin = (chain(row.provider), row.amount + row.fee)
            yield from book.claim(f"{key}:confirmed", (aside, -row.amount), (FEES, -row.fee), coin)
        elif row.state == "failed":
            taken = ((FEES, -row.fee), (chain(row.provider), row.fee)) if row.fee else ()
            yield from book.claim(f"{key}:failed", (aside, -row.amount), (own, row.amount), *taken)
        else:
            under_way[aside] += row.amount
    for account in {name for name in book.balances if kind_of(name) == "paying"} | under_way.keys():
        if book.balances[account] != under_way[account]:
            yield Finding(account, f"payouts under way are {under_way[account]}, it has {book.balances[account]}")
