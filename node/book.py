"""What this worker did for whom: its own copy of every ended job's ticket and receipt, and sums that outlive them.

A SQLite file in the data folder. A job is written down once, with what it adds to the sums, in a transaction that is on
disk before the receipt is handed over; jobs that end together share one, since coordinators wait for receipts. Nothing
is changed afterwards; the oldest tickets and receipts are deleted where they take more room, or are older, than the
owner wants. The sums keep what they told.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from azu.economics import split, token_layers
from azu.errors import InternalError
from azu.tickets import JobTicket, Receipt

__all__ = ["BOOK_FILE", "Book", "Earned", "Served", "entry_of"]

BOOK_FILE = "earnings.sqlite3"
KEEP_BYTES = 256 << 20  # about 150,000 jobs
KEEP_S = 400 * 86_400  # a year, and some time to look at it
# Rows that one more job may have deleted: more than it adds, so that a smaller limit is reached in time.
_PRUNED = 32
_LOCKED_S = 10.0

_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS served (
    number INTEGER PRIMARY KEY, job_id TEXT NOT NULL, epoch INTEGER NOT NULL, coordinator TEXT NOT NULL,
    ended_at INTEGER NOT NULL, is_settled INTEGER NOT NULL, positions INTEGER NOT NULL, token_layers INTEGER NOT NULL,
    earned TEXT NOT NULL, ticket BLOB NOT NULL, receipt BLOB NOT NULL,
    UNIQUE (job_id, epoch, coordinator)
) STRICT;
CREATE TABLE IF NOT EXISTS sums (
    coordinator TEXT PRIMARY KEY, jobs INTEGER NOT NULL, unsettled INTEGER NOT NULL,
    token_layers INTEGER NOT NULL, earned TEXT NOT NULL, since INTEGER NOT NULL, last INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS statements (
    coordinator TEXT PRIMARY KEY, envelope BLOB NOT NULL, issued_at INTEGER NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS served_is_append_only BEFORE UPDATE ON served
    BEGIN SELECT RAISE(ABORT, 'what was served does not change'); END;
"""


@dataclass(frozen=True, slots=True)
class Served:
    """One ended job in this worker. earned: in its coordinator's smallest unit, for as much as both sides count.

    is_settled: whether the coordinator ended it and was given the receipt; else it went away, or went on without us.
    """

    job_id: str
    epoch: int
    coordinator: str
    ended_at: int
    is_settled: bool
    positions: int
    token_layers: int
    earned: int
    ticket: bytes
    receipt: bytes


@dataclass(frozen=True, slots=True)
class Earned:
    """All that was served for one coordinator. unsettled: how many of the jobs it never asked the receipt of."""

    coordinator: str
    jobs: int
    unsettled: int
    token_layers: int
    earned: int
    since: int
    last: int


@dataclass(eq=False, slots=True)
class _Waiting:
    entry: Served
    error: InternalError | None = None


def entry_of(ticket: JobTicket, receipt: Receipt, counted: int | None, envelopes: tuple[bytes, bytes]) -> Served:
    """What to write down of a job. Pure.

    Args:
        counted: tokens that the coordinator says came of it, None where it did not say.
        envelopes: the ticket and the receipt, signed.
    """
    paid_from = ticket.stages[receipt.stage].paid_from
    positions = 0 if counted is None else max(0, min(receipt.tokens, ticket.positions(counted)) - paid_from)
    work = token_layers(positions, receipt.end - receipt.start)
    return Served(
        job_id=ticket.job_id.hex(),
        epoch=ticket.epoch,
        coordinator=ticket.coordinator,
        ended_at=receipt.issued_at,
        is_settled=counted is not None,
        positions=receipt.tokens,
        token_layers=work,
        earned=split(work * ticket.price).worker,
        ticket=envelopes[0],
        receipt=envelopes[1],
    )


class Book:
    """The file. One process writes it, any number may read it meanwhile."""

    def __init__(self, folder: Path, *, keep_bytes: int = KEEP_BYTES, keep_s: int = KEEP_S) -> None:
        self._path = folder / BOOK_FILE
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._turn = trio.Lock()
        self._waiting: list[_Waiting] = []
        with self._open() as db:
            db.executescript(_SCHEMA)

    async def write(self, entry: Served) -> None:
        """Write a job down; a second time changes nothing.

        Raises:
            InternalError: the file cannot be written.
        """
        mine = _Waiting(entry)
        self._waiting.append(mine)
        async with self._turn:
            if mine in self._waiting:  # else it was written in somebody else's turn
                together, self._waiting = self._waiting, []
                await self._write_together(together)
        if mine.error is not None:
            raise mine.error

    async def _write_together(self, together: list[_Waiting]) -> None:
        with trio.CancelScope(shield=True):  # the others would not learn that it was not done
            try:
                await trio.to_thread.run_sync(self._write, [each.entry for each in together])
            except InternalError as error:
                for each in together:
                    each.error = error

    def earned(self) -> tuple[Earned, ...]:
        """The sums for each coordinator; raises InternalError as `write` does."""
        with self._open() as db:
            rows = db.execute(
                "SELECT coordinator, jobs, unsettled, token_layers, earned, since, last FROM sums ORDER BY coordinator"
            )
            return tuple(Earned(c, jobs, lost, work, int(earned), *when) for c, jobs, lost, work, earned, *when in rows)

    async def keep_statement(self, coordinator: str, envelope: bytes, issued_at: int) -> None:
        """Keep what a coordinator signed that it owes us, in place of an older one; raises as `write` does."""
        async with self._turn:
            await trio.to_thread.run_sync(self._keep_statement, coordinator, envelope, issued_at)

    def _keep_statement(self, coordinator: str, envelope: bytes, issued_at: int) -> None:
        with self._open() as db:
            db.execute(
                "INSERT INTO statements VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET envelope = excluded.envelope, "
                "issued_at = excluded.issued_at WHERE excluded.issued_at >= issued_at",
                (coordinator, envelope, issued_at),
            )

    def statements(self) -> dict[str, bytes]:
        """The last statement of each coordinator, in its envelope; raises as `write` does."""
        with self._open() as db:
            return dict(db.execute("SELECT coordinator, envelope FROM statements"))

    def find(self, job_id: str) -> tuple[Served, ...]:
        """What is kept of a job, for each of its epochs that ended here; raises InternalError as `write` does."""
        return self._served("WHERE job_id = ? ORDER BY epoch", job_id)

    def latest(self, count: int) -> tuple[Served, ...]:
        """The last jobs that are kept, the newest first; raises InternalError as `write` does."""
        return self._served("ORDER BY number DESC LIMIT ?", count)

    def _served(self, which: str, parameter: str | int) -> tuple[Served, ...]:
        columns = "job_id, epoch, coordinator, ended_at, is_settled, positions, token_layers, earned, ticket, receipt"
        with self._open() as db:
            return tuple(
                Served(job, epoch, c, at, bool(settled), positions, work, int(earned), ticket, receipt)
                for job, epoch, c, at, settled, positions, work, earned, ticket, receipt in db.execute(
                    f"SELECT {columns} FROM served {which}",  # noqa: S608 - both are ours
                    (parameter,),
                )
            )

    def _write(self, entries: Sequence[Served]) -> None:
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            for entry in entries:
                self._insert(db, entry)

    def _insert(self, db: sqlite3.Connection, entry: Served) -> None:
        is_new = db.execute(
            "INSERT INTO served (job_id, epoch, coordinator, ended_at, is_settled, positions, token_layers, "
            "earned, ticket, receipt) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (entry.job_id, entry.epoch, entry.coordinator, entry.ended_at, int(entry.is_settled), entry.positions,
             entry.token_layers, str(entry.earned), entry.ticket, entry.receipt),
        ).rowcount  # fmt: skip
        if is_new:
            self._add(db, entry)
            self._prune(db, entry.ended_at)

    def _add(self, db: sqlite3.Connection, entry: Served) -> None:
        query = "SELECT earned FROM sums WHERE coordinator = ?"
        before = int((db.execute(query, (entry.coordinator,)).fetchone() or ("0",))[0])
        db.execute(
            "INSERT INTO sums VALUES (?, 1, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET jobs = jobs + 1, "
            "unsettled = unsettled + excluded.unsettled, token_layers = token_layers + excluded.token_layers, "
            "earned = excluded.earned, last = excluded.last",
            (entry.coordinator, int(not entry.is_settled), entry.token_layers, str(before + entry.earned),
             entry.ended_at, entry.ended_at),
        )  # fmt: skip

    def _prune(self, db: sqlite3.Connection, now: int) -> None:
        pages, free, size = (
            db.execute(f"PRAGMA {each}").fetchone()[0] for each in ("page_count", "freelist_count", "page_size")
        )
        is_full = (pages - free) * size > self._keep_bytes
        db.execute(
            "DELETE FROM served WHERE number IN (SELECT number FROM served ORDER BY number LIMIT ?) "
            "AND (? OR ended_at < ?)",
            (_PRUNED, is_full, now - self._keep_s),
        )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection with one transaction: on disk at the end, or rolled back."""
        try:
            with closing(sqlite3.connect(self._path, timeout=_LOCKED_S)) as db, db:
                db.execute("PRAGMA synchronous = FULL")
                yield db
        except (sqlite3.Error, OverflowError) as error:
            raise InternalError(
                f"the file of this worker's earnings, {self._path}, cannot be used: {error}",
                code="earnings_failed",
                remedy="Check that its disk is not full and that it is not damaged",
            ) from error
