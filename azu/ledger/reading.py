"""What can be asked of a ledger; each function reads one consistent state through its connection."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import Connection, select

from azu.ledger import schema
from azu.ledger.answers import Entry, JobUse, Line, Payout, PayoutState, Reserved, SignedPayout
from azu.ledger.store import payout_of, reservation_of

__all__ = [
    "MAX_ROWS",
    "balance",
    "balances",
    "Head",
    "entries",
    "kept_jobs",
    "head",
    "open_reservations",
    "payouts",
    "signings",
    "spent",
    "statement",
    "usage",
]


@dataclass(frozen=True, slots=True)
class Head:
    """Where the ledger ends: `digest` covers all that is in it."""

    currency: str
    seq: int
    digest: str


MAX_ROWS = 1000  # of a list that is asked for over HTTP
_CHUNK = 1000  # rows that are read at once


def balance(connection: Connection, account: str) -> int:
    """What an account has; 0 where it was never used."""
    table = schema.balances
    found = connection.execute(select(table.c.balance).where(table.c.account == account)).scalar_one_or_none()
    return found or 0


def balances(connection: Connection, kind: str) -> dict[str, int]:
    """All accounts of a kind that are not empty, such as "worker", by what comes after the colon."""
    table = schema.balances
    rows = connection.execute(select(table.c.account, table.c.balance).where(table.c.kind == kind))
    return {account.partition(":")[2]: amount for account, amount in rows if amount}


def spent(connection: Connection, key_id: str) -> int:
    """What was captured and is reserved through an API key."""
    table = schema.key_spending
    found = connection.execute(select(table.c.spent).where(table.c.key_id == key_id)).scalar_one_or_none()
    return found or 0


def usage(connection: Connection, wallet: str, since: int, limit: int) -> list[JobUse]:
    """The wallet's latest settled jobs from `since` (unix seconds) on, newest first."""
    table = schema.jobs
    names = JobUse.__slots__
    rows = connection.execute(
        select(*(table.c[name] for name in names))
        .where(table.c.wallet == wallet, table.c.settled_at >= since)
        .order_by(table.c.settled_at.desc(), table.c.seq.desc())
        .limit(min(limit, MAX_ROWS))
    )
    return [JobUse(**row) for row in rows.mappings()]


def open_reservations(
    connection: Connection, *, owner: str | None = None, expired_before: int | None = None
) -> list[Reserved]:
    """Reservations of jobs that have not ended: one coordinator's, and those that expired before a time."""
    table = schema.reservations
    query = select(table).where(table.c.state == "open")
    if owner is not None:
        query = query.where(table.c.owner == owner)
    if expired_before is not None:
        query = query.where(table.c.expires_at < expired_before)
    return [reservation_of(row) for row in connection.execute(query).mappings()]


def kept_jobs(connection: Connection) -> set[str]:
    """The ids of jobs that outlive their coordinator's process."""
    return set(connection.execute(select(schema.kept_jobs.c.job_id)).scalars())


def payouts(
    connection: Connection, states: Collection[PayoutState] = (), *, peer_id: str | None = None, limit: int = MAX_ROWS
) -> list[Payout]:
    """Payouts in these states (in any where empty), newest first."""
    table = schema.payouts
    query = select(table).order_by(table.c.planned_at.desc(), table.c.payout_id).limit(limit)
    if states:
        query = query.where(table.c.state.in_(list(states)))
    if peer_id is not None:
        query = query.where(table.c.peer_id == peer_id)
    return [payout_of(row) for row in connection.execute(query).mappings()]


def signings(connection: Connection, payout_id: str) -> list[SignedPayout]:
    """The transactions that were signed for a payout, the latest last."""
    table = schema.payout_transactions
    columns = [table.c[name] for name in SignedPayout.__slots__]
    rows = connection.execute(select(*columns).where(table.c.payout_id == payout_id).order_by(table.c.number))
    return [SignedPayout(**row) for row in rows.mappings()]


def head(connection: Connection) -> Head:
    """Where the ledger ends."""
    row = connection.execute(select(schema.head)).one()
    return Head(row.currency, row.seq, row.digest.hex())


def entries(connection: Connection, since: int = 0) -> Iterator[Entry]:
    """All transactions from a number on, with their postings, in order."""
    heads, lines = schema.transactions, schema.postings
    query = (
        select(heads, lines.c.account, lines.c.amount)
        .outerjoin(lines, heads.c.seq == lines.c.seq)
        .where(heads.c.seq >= since)
        .order_by(heads.c.seq, lines.c.number)
    )
    rows = connection.execute(query, execution_options={"yield_per": _CHUNK})
    for _, group in groupby(rows, key=lambda row: row.seq):
        of_one = list(group)
        first = of_one[0]
        postings = tuple((row.account, row.amount) for row in of_one if row.account is not None)
        yield Entry(first.seq, first.key, first.kind, first.at, postings, first.digest.hex())


def statement(connection: Connection, account: str, since: int = 0) -> list[Line]:
    """What moved on an account from `since` (unix seconds) on, with its balance after each."""
    heads, lines = schema.transactions, schema.postings
    query = (
        select(heads.c.seq, heads.c.key, heads.c.kind, heads.c.at, lines.c.amount)
        .join(heads, heads.c.seq == lines.c.seq)
        .where(lines.c.account == account)
        .order_by(heads.c.seq)
    )
    total = 0
    found: list[Line] = []
    for row in connection.execute(query):
        total += row.amount
        if row.at >= since:
            found.append(Line(row.seq, row.key, row.kind, row.at, row.amount, total))
    return found
