"""Requests that outlive the process which has their jobs run, in the ledger's database, by rows.

    nobody's row ── begin ──► led ── forget ──► gone
                               │ ▲
                        let go ▼ │ claim: the term grows
                             waiting

Who leads a request names its term with all that it writes: in a later one nothing of it counts any more.
`coordinator.journal` says what is in the rows' documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from azu.ledger import Ledger, schema

__all__ = ["Claimed", "KeptRequests", "KeptRow", "Lead", "Waiting"]

_REQUESTS, _JOBS = schema.kept, schema.kept_jobs


@dataclass(frozen=True, slots=True)
class Lead:
    """That this coordinator has a request's jobs run, in this term."""

    request_id: str
    term: int = 1


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that nobody leads. manifest: the model's digest. wallet: whose it is."""

    request_id: str
    kind: str
    manifest: str
    wallet: str


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A new request. asked: a document. jobs: the id of each, and a document of how it stands."""

    request_id: str
    kind: str
    manifest: str
    wallet: str
    asked: bytes
    jobs: Sequence[tuple[str, bytes]]


class Claimed(NamedTuple):
    """What was claimed: the documents of a request and of its jobs."""

    lead: Lead
    asked: bytes
    standings: Sequence[bytes]


class KeptRequests:
    """The rows. Methods raise InternalError where the database cannot be used.

    All may be run again where it is not known whether they were committed. Those with a connection are for
    transactions that do more.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._me = ledger.owner

    async def begin(self, row: KeptRow) -> Lead:
        """Note a request; this coordinator leads it."""
        return await self._ledger.write(partial(self.insert, row=row))

    def insert(self, connection: Connection, row: KeptRow) -> Lead:
        """The same."""
        lead = Lead(row.request_id)
        if connection.execute(select(_REQUESTS.c.term).where(_is(lead.request_id))).first() is not None:
            return lead
        fields = {name: getattr(row, name) for name in ("request_id", "kind", "manifest", "wallet", "asked")}
        connection.execute(insert(_REQUESTS), {**fields, "leader": self._me, "term": lead.term})
        jobs: list[dict[str, Any]] = [
            {"job_id": job_id, "request_id": row.request_id, "number": number, "standing": standing}
            for number, (job_id, standing) in enumerate(row.jobs)
        ]
        connection.execute(insert(_JOBS), jobs)
        return lead

    async def note(self, lead: Lead, number: int, standing: bytes) -> bool:
        """Note how a job stands; False where this coordinator leads it no more."""
        of = (_JOBS.c.request_id == lead.request_id, _JOBS.c.number == number)
        query = update(_JOBS).where(*of, _leads(lead)).values(standing=standing)
        return bool(await self._ledger.write(lambda connection: connection.execute(query).rowcount))

    async def forget(self, lead: Lead) -> None:
        """All of its jobs have ended."""
        await self._ledger.write(partial(self.remove, lead=lead))

    def remove(self, connection: Connection, lead: Lead) -> None:
        """The same."""
        connection.execute(delete(_JOBS).where(_JOBS.c.request_id == lead.request_id, _leads(lead)))
        connection.execute(delete(_REQUESTS).where(_is(lead.request_id), _in_term(lead)))

    async def let_go(self, lead: Lead) -> None:
        """Leave it to whoever claims it."""
        query = update(_REQUESTS).where(_is(lead.request_id), _in_term(lead)).values(leader=None)
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def let_go_all(self) -> None:
        """Leave what this coordinator led in an earlier life."""
        query = update(_REQUESTS).where(_REQUESTS.c.leader == self._me).values(leader=None)
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def waiting(self, request_id: str | None = None) -> Sequence[Waiting]:
        """The requests that nobody leads, or this one of them."""
        query = select(*(_REQUESTS.c[name] for name in Waiting.__slots__)).where(_REQUESTS.c.leader.is_(None))
        if request_id is not None:
            query = query.where(_is(request_id))
        rows = await self._ledger.read(lambda connection: connection.execute(query).mappings().all())
        return [Waiting(**row) for row in rows]

    async def claim(self, request_id: str) -> Claimed | None:
        """Lead a request that nobody leads; None where somebody does, or it is not there any more."""
        return await self._ledger.write(partial(self._claim, request_id, []))

    def _claim(self, request_id: str, before: list[int], connection: Connection) -> Claimed | None:
        """before: the term that this very claim began, if it was committed before the connection broke."""
        query = select(_REQUESTS.c.leader, _REQUESTS.c.term, _REQUESTS.c.asked).where(_is(request_id))
        found = connection.execute(query.with_for_update()).one_or_none()
        if found is None or (found.leader is not None and found.term not in before):
            return None
        if found.leader is None:
            before.append(found.term + 1)
            values = {"leader": self._me, "term": found.term + 1}
            connection.execute(update(_REQUESTS).where(_is(request_id)).values(values))
        rows = select(_JOBS.c.standing).where(_JOBS.c.request_id == request_id).order_by(_JOBS.c.number)
        return Claimed(Lead(request_id, before[-1]), found.asked, connection.execute(rows).scalars().all())


def _is(request_id: str) -> Any:
    return _REQUESTS.c.request_id == request_id


def _in_term(lead: Lead) -> Any:
    return (_REQUESTS.c.term == lead.term) & _REQUESTS.c.leader.is_not(None)


def _leads(lead: Lead) -> Any:
    return select(_REQUESTS.c.term).where(_is(lead.request_id), _in_term(lead)).exists()
