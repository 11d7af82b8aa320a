"""Submitted jobs and what came of them, in the ledger's database: any coordinator that shares it can be asked.

Kept within time, number and size. Those that run are never dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from azu.ledger import Ledger, schema

__all__ = ["KEPT_S", "Also", "Submitted", "SubmittedJobs"]

KEPT_S = 3_600
# Running and ended together, of one account and of all.
MAX_OF_ACCOUNT = 100
MAX_KEPT = 10_000
# Characters of all outcomes together.
MAX_CHARS = 64 * 2**20

_TABLE = schema.submitted


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submitted job; times are unix seconds.

    account: whose it is. owner: the coordinator that took it, by peer id. outcome: JSON, once it has ended.
    idempotency: digest of the key that its client names it by, or empty. asked: digest of what it asked for with it.
    """

    job_id: str
    account: str
    owner: str
    model_id: str
    created_at: int
    status: Literal["queued", "running", "done", "failed"] = "queued"
    ended_at: int | None = None
    outcome: str = ""
    idempotency: str = ""
    asked: str = ""


# Done in the same transaction.
Also = Callable[[Connection], object]
# Done first in it; whether the rest still counts.
If = Callable[[Connection], bool]


class SubmittedJobs:
    """All of them; one for the app. Raises InternalError where the database cannot be used."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def add(self, job: Submitted, now: int, also: Also) -> Submitted | None:
        """Keep one, or find the one that its client named by the same key before, and has not failed.

        An older result makes room for it. None where only running jobs are in its way.
        """
        return await self._ledger.write(lambda connection: _add(connection, job, now, also))

    async def start(self, job_id: str) -> None:
        """Note that one runs."""
        query = update(_TABLE).where(_TABLE.c.job_id == job_id, _TABLE.c.status == "queued").values(status="running")
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def end(self, job_id: str, status: Literal["done", "failed"], outcome: str, now: int, first: If) -> None:
        """Note what came of one; whoever keeps the most loses the oldest where all together are too much."""

        def work(connection: Connection) -> None:
            connection.execute(select(schema.head.c.id).with_for_update())
            if first(connection):
                _end(connection, job_id, status, outcome, now)

        await self._ledger.write(work)

    async def drop(self, job_id: str, also: Also) -> None:
        """Keep one no longer."""

        def work(connection: Connection) -> None:
            connection.execute(delete(_TABLE).where(_TABLE.c.job_id == job_id))
            also(connection)

        await self._ledger.write(work)

    async def find(self, job_id: str, now: int) -> Submitted | None:
        """One that is still kept."""

        def work(connection: Connection) -> Submitted | None:
            row = connection.execute(_select().where(_TABLE.c.job_id == job_id)).mappings().one_or_none()
            return None if row is None else Submitted(**row)

        found = await self._ledger.read(work)
        return None if found is None or _is_old(found, now) else found

    async def end_forgotten(self, owner: str, outcome: str, now: int) -> int:
        """Note that all jobs failed which a coordinator took and nobody can go on with; how many."""
        values = {"status": "failed", "ended_at": now, "outcome": outcome, "chars": len(outcome)}
        of = (_TABLE.c.owner == owner, _TABLE.c.ended_at.is_(None))
        query = update(_TABLE).where(*of, _TABLE.c.job_id.not_in(select(schema.kept_jobs.c.job_id))).values(values)
        return await self._ledger.write(lambda connection: connection.execute(query).rowcount)


def _select() -> Any:
    return select(*(_TABLE.c[name] for name in Submitted.__slots__))


def _is_old(job: Submitted, now: int) -> bool:
    return job.ended_at is not None and now >= job.ended_at + KEPT_S


def _add(connection: Connection, job: Submitted, now: int, also: Also) -> Submitted | None:
    connection.execute(select(schema.head.c.id).with_for_update())  # as all who write take turns
    is_same = _TABLE.c.job_id == job.job_id  # committed, and the connection lost before that was known
    if job.idempotency:
        is_same |= (_TABLE.c.idempotency == job.idempotency) & (_TABLE.c.status != "failed")
    connection.execute(delete(_TABLE).where(_TABLE.c.ended_at <= now - KEPT_S))
    if (known := connection.execute(_select().where(is_same)).mappings().first()) is not None:
        return Submitted(**known)
    own = _TABLE.c.account == job.account
    for among, most in ((own, MAX_OF_ACCOUNT), (_TABLE.c.job_id.is_not(None), MAX_KEPT)):
        count = connection.execute(select(func.count()).select_from(_TABLE).where(among)).scalar_one()
        if count >= most and not _drop_first(connection, among):
            return None
    connection.execute(insert(_TABLE), {**asdict(job), "came_ns": time.time_ns(), "chars": 0})
    also(connection)
    return job


def _end(connection: Connection, job_id: str, status: Literal["done", "failed"], outcome: str, now: int) -> None:
    values = {"status": status, "ended_at": now, "outcome": outcome, "chars": len(outcome)}
    connection.execute(update(_TABLE).where(_TABLE.c.job_id == job_id).values(values))
    while connection.execute(select(func.coalesce(func.sum(_TABLE.c.chars), 0))).scalar_one() > MAX_CHARS:
        chars = func.sum(_TABLE.c.chars)
        query = select(_TABLE.c.account).group_by(_TABLE.c.account).order_by(chars.desc(), _TABLE.c.account).limit(1)
        largest = connection.execute(query).scalar_one()
        if not _drop_first(connection, _TABLE.c.account == largest):
            return


def _drop_first(connection: Connection, among: ColumnElement[bool]) -> bool:
    """Drop the oldest of those that have ended; False where there is none."""
    ended = select(_TABLE.c.job_id).where(among, _TABLE.c.ended_at.is_not(None))
    first = connection.execute(ended.order_by(_TABLE.c.came_ns, _TABLE.c.job_id).limit(1)).scalar_one_or_none()
    if first is not None:
        connection.execute(delete(_TABLE).where(_TABLE.c.job_id == first))
    return first is not None
