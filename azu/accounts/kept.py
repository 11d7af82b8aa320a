"""Requests that outlive the process which has their jobs run, in the ledger's database, by rows.

    nobody's row ── begin ──► led ── forget ──► gone
                               │ ▲
      let go, or its leader is ▼ │ claim: the term grows
      gone (`presence.py`)   waiting

Who leads a request names its term with all that it writes: in a later one nothing of it counts any more.
`coordinator.journal` says what is in the rows' documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from azu.accounts.presence import Presence
from azu.ledger import Ledger, schema

__all__ = ["Claimed", "KeptHead", "KeptRequests", "KeptRow", "Lead"]

_REQUESTS, _JOBS = schema.kept, schema.kept_jobs


@dataclass(frozen=True, slots=True)
class Lead:
    """That this coordinator has a request's jobs run, in this term."""

    request_id: str
    term: int = 1


@dataclass(frozen=True, slots=True)
class KeptHead:
    """A request, without its documents. manifest: the model's digest. wallet: whose it is. leader: a peer id."""

    request_id: str
    kind: str
    manifest: str
    wallet: str
    leader: str | None


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

    def __init__(self, ledger: Ledger, presence: Presence) -> None:
        self.presence = presence
        self._ledger = ledger
        self._me = ledger.owner
        self._over: set[Lead] = set()  # of which that is not written down yet

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
        query = update(_JOBS).where(*of).values(standing=standing)

        def work(connection: Connection) -> bool:
            return _leads(connection, lead) and bool(connection.execute(query).rowcount)

        return await self._ledger.write(work)

    async def forget(self, lead: Lead) -> None:
        """All of its jobs have ended. Where the database is away, whoever asks what waits has it forgotten later."""
        self._over.add(lead)
        await self._ledger.write(partial(self.remove, lead=lead))
        self._over.discard(lead)

    def remove(self, connection: Connection, lead: Lead) -> bool:
        """The same; False where this coordinator leads it no more."""
        if not _leads(connection, lead):
            return False
        connection.execute(delete(_JOBS).where(_JOBS.c.request_id == lead.request_id))
        connection.execute(delete(_REQUESTS).where(_is(lead.request_id)))
        return True

    async def leads(self, lead: Lead) -> bool:
        """Whether this coordinator leads it still, and will for a while."""
        await self.presence.confirm()
        query = select(_REQUESTS.c.term).where(_is(lead.request_id), _in_term(lead))
        return await self._ledger.read(lambda connection: connection.execute(query).first() is not None)

    async def let_go(self, lead: Lead) -> None:
        """Leave it to whoever claims it."""
        query = update(_REQUESTS).where(_is(lead.request_id), _in_term(lead)).values(leader=None)
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def let_go_all(self) -> None:
        """Leave what this coordinator led in an earlier life."""
        query = update(_REQUESTS).where(_REQUESTS.c.leader == self._me).values(leader=None)
        await self._ledger.write(lambda connection: connection.execute(query).rowcount)

    async def waiting(self) -> Sequence[KeptHead]:
        """The requests that nobody leads."""
        for lead in tuple(self._over):
            await self.forget(lead)
        is_led = _REQUESTS.c.leader.in_(sorted(self.presence.alive))
        query = _heads().where(_REQUESTS.c.leader.is_(None) | ~is_led)
        rows = await self._ledger.read(lambda connection: connection.execute(query).mappings().all())
        return [KeptHead(**row) for row in rows]

    async def find(self, request_id: str) -> KeptHead | None:
        """One that runs or waits."""
        query = _heads().where(_is(request_id))
        row = await self._ledger.read(lambda connection: connection.execute(query).mappings().one_or_none())
        return None if row is None else KeptHead(**row)

    async def claim(self, request_id: str) -> Claimed | None:
        """Lead a request that nobody leads; None where somebody does, or it is not there any more."""
        return await self._ledger.write(partial(self._claim, request_id, []))

    def _claim(self, request_id: str, before: list[int], connection: Connection) -> Claimed | None:
        """before: the term that this very claim began, if it was committed before the connection broke."""
        connection.execute(select(schema.head.c.id).with_for_update())  # settlements look at who leads
        query = select(_REQUESTS.c.leader, _REQUESTS.c.term, _REQUESTS.c.asked).where(_is(request_id))
        found = connection.execute(query.with_for_update()).one_or_none()
        if found is None:
            return None
        if found.term not in before:
            if found.leader is not None and not self._is_deposed(connection, found.leader):
                return None
            before.append(found.term + 1)
            values = {"leader": self._me, "term": found.term + 1}
            connection.execute(update(_REQUESTS).where(_is(request_id)).values(values))
        rows = select(_JOBS.c.standing).where(_JOBS.c.request_id == request_id).order_by(_JOBS.c.number)
        return Claimed(Lead(request_id, before[-1]), found.asked, connection.execute(rows).scalars().all())

    def _is_deposed(self, connection: Connection, leader: str) -> bool:
        return self.presence.is_gone(leader) and self.presence.take_off(connection, leader)


def _heads() -> Any:
    return select(*(_REQUESTS.c[name] for name in KeptHead.__slots__))


def _is(request_id: str) -> Any:
    return _REQUESTS.c.request_id == request_id


def _in_term(lead: Lead) -> Any:
    return (_REQUESTS.c.term == lead.term) & _REQUESTS.c.leader.is_not(None)


def _leads(connection: Connection, lead: Lead) -> bool:
    """Whether it is led in this term, which nobody ends before this transaction."""
    query = select(_REQUESTS.c.term).where(_is(lead.request_id), _in_term(lead)).with_for_update()
    return connection.execute(query).first() is not None
