"""Submitted jobs and what came of them, in the ledger's database: any coordinator that shares it can be asked.

Kept within time, number and size. Those that run are never dropped.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from azu.ledger import Ledger, schema

__all__ = ["KEPT_S", "Submitted", "SubmittedJobs"]

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

    account: whose it is. owner: the coordinator that runs it, by peer id. outcome: JSON, once it has ended.
    """

    job_id: str
    account: str
    owner: str
    model_id: str
    created_at: int
    status: Literal["queued", "running", "done", "failed"] = "queued"
    ended_at: int | None = None
    outcome: str = ""


class SubmittedJobs:
    """All of them; one for the app. Raises InternalError where the database cannot be used."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def add(self, job: Submitted, now: int) -> bool:
        """Keep one; an older result makes room for it. False where only running jobs are in its way."""
        return await self._ledger.write(lambda connection: _add(connection, job, now))

    async def start(self, job_id: str) -> None:
        """Note that one runs."""
        query = update(_TABLE).where(_TABLE.c.job_id == job_id, _TABLE.c.status == "queued").values(status="running")
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def end(self, job: Submitted, status: Literal["done", "failed"], outcome: str, now: int) -> None:
        """Note what came of one; whoever keeps the most loses the oldest where all together are too much."""
        ended = replace(job, status=status, ended_at=now, outcome=outcome)
        await self._ledger.write(lambda connection: _end(connection, ended))

    async def drop(self, job_id: str) -> None:
        """Keep one no longer."""
        query = delete(_TABLE).where(_TABLE.c.job_id == job_id)
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def find(self, job_id: str, now: int) -> Submitted | None:
        """One that is still kept."""

        def work(connection: Connection) -> Submitted | None:
            row = connection.execute(_select().where(_TABLE.c.job_id == job_id)).mappings().one_or_none()
            return None if row is None else Submitted(**row)

        found = await self._ledger.read(work)
        return None if found is None or _is_old(found, now) else found

    async def end_all_of(self, owner: str, outcome: str, now: int) -> int:
        """Note that all jobs failed which a coordinator ran in an earlier life; how many."""
        values = {"status": "failed", "ended_at": now, "outcome": outcome, "chars": len(outcome)}
        query = update(_TABLE).where(_TABLE.c.owner == owner, _TABLE.c.ended_at.is_(None)).values(values)
        return await self._ledger.write(lambda connection: connection.execute(query).rowcount)


def _select() -> Any:
    return select(*(_TABLE.c[name] for name in Submitted.__slots__))


def _is_old(job: Submitted, now: int) -> bool:
    return job.ended_at is not None and now >= job.ended_at + KEPT_S


def _add(connection: Connection, job: Submitted, now: int) -> bool:
    connection.execute(select(schema.head.c.id).with_for_update())  # as all who write take turns
    if connection.execute(select(_TABLE.c.job_id).where(_TABLE.c.job_id == job.job_id)).first() is not None:
        return True  # committed, and the connection lost before that was known
    connection.execute(delete(_TABLE).where(_TABLE.c.ended_at <= now - KEPT_S))
    own = _TABLE.c.account == job.account
    for among, most in ((own, MAX_OF_ACCOUNT), (_TABLE.c.job_id.is_not(None), MAX_KEPT)):
        count = connection.execute(select(func.count()).select_from(_TABLE).where(among)).scalar_one()
        if count >= most and not _drop_first(connection, among):
            return False
    connection.execute(insert(_TABLE), {**asdict(job), "came_ns": time.time_ns(), "chars": 0})
    return True


def _end(connection: Connection, job: Submitted) -> None:
    connection.execute(select(schema.head.c.id).with_for_update())
    values = {"status": job.status, "ended_at": job.ended_at, "outcome": job.outcome, "chars": len(job.outcome)}
    connection.execute(update(_TABLE).where(_TABLE.c.job_id == job.job_id).values(values))
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
