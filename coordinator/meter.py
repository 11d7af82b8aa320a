"""What each job cost and who earned it, written down for good.

A job's tokens are counted by the coordinator alone: it saw them come. A stage's receipt has to confirm at least as many
positions as that count implies, else its earnings are held. With `p` prompt and `c` completion tokens, `p + c - 1`
positions went through every layer, since the last token is sampled and never run; nothing is charged where no token
came out.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import trio

from azu.economics import split, token_layers
from azu.errors import InternalError
from azu.tickets import JobTicket, Receipt
from coordinator.generation import JobReport, StageReport

__all__ = ["Meter", "read_job"]

Receipts = Mapping[int, tuple[bytes, Receipt]]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id TEXT NOT NULL, epoch INTEGER NOT NULL, manifest TEXT NOT NULL, settled_at INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    token_layers INTEGER NOT NULL, cost INTEGER NOT NULL,
    PRIMARY KEY (job_id, epoch)
) STRICT;
CREATE TABLE IF NOT EXISTS stages (
    job_id TEXT NOT NULL, epoch INTEGER NOT NULL, stage INTEGER NOT NULL,
    peer_id TEXT NOT NULL, first_layer INTEGER NOT NULL, end_layer INTEGER NOT NULL,
    tokens INTEGER NOT NULL, token_layers INTEGER NOT NULL, earned INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('credited', 'held')), receipt BLOB,
    PRIMARY KEY (job_id, epoch, stage), FOREIGN KEY (job_id, epoch) REFERENCES jobs (job_id, epoch)
) STRICT;
"""


def read_job(ticket: JobTicket, emitted: int, receipts: Receipts) -> JobReport:
    """The meter's reading of a job of which `emitted` tokens reached the coordinator. Pure."""
    positions = ticket.prompt_tokens + emitted - 1 if emitted else 0
    stages = tuple(_read_stage(ticket, index, positions, receipts) for index in range(len(ticket.stages)))
    total = token_layers(positions, ticket.n_layers)
    return JobReport(
        job_id=ticket.job_id.hex(),
        prompt_tokens=ticket.prompt_tokens,
        completion_tokens=emitted,
        token_layers=total,
        cost=total * ticket.price,
        stages=stages,
    )


def _read_stage(ticket: JobTicket, index: int, positions: int, receipts: Receipts) -> StageReport:
    stage = ticket.stages[index]
    confirmed = index in receipts and receipts[index][1].tokens >= positions
    work = token_layers(positions, stage.end - stage.start)
    return StageReport(
        peer_id=stage.peer_id,
        start=stage.start,
        end=stage.end,
        tokens=positions,
        token_layers=work,
        earned=split(work * ticket.price).worker,
        state="credited" if confirmed else "held",
    )


class Meter:
    """The book of settled jobs: an append-only SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)

    async def settle(self, ticket: JobTicket, emitted: int, receipts: Receipts) -> JobReport:
        """Read the meter for an ended job and write it down; a job that is already written down stays as it is.

        Raises:
            InternalError: the file cannot be written.
        """
        report = read_job(ticket, emitted, receipts)
        await trio.to_thread.run_sync(self._write, ticket, report, dict(receipts))
        return report

    def _write(self, ticket: JobTicket, report: JobReport, receipts: Receipts) -> None:
        job = (report.job_id, ticket.epoch)
        totals = (report.prompt_tokens, report.completion_tokens, report.token_layers, report.cost)
        rows = [
            (*job, index, s.peer_id, s.start, s.end, s.tokens, s.token_layers, s.earned, s.state,
             receipts[index][0] if index in receipts else None)
            for index, s in enumerate(report.stages)
        ]  # fmt: skip
        with self._open() as db:
            written = db.execute(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (*job, ticket.manifest, int(time.time()), *totals),
            ).rowcount
            if written:
                db.executemany("INSERT INTO stages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def earnings(self) -> dict[str, int]:
        """Credited smallest units by worker peer id, over all jobs."""
        with self._open() as db:
            query = "SELECT peer_id, SUM(earned) FROM stages WHERE state = 'credited' GROUP BY peer_id"
            return {str(peer_id): int(earned) for peer_id, earned in db.execute(query)}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection with one transaction: committed at the end, or rolled back."""
        try:
            with closing(sqlite3.connect(self._path, timeout=10)) as db, db:
                yield db
        except (sqlite3.Error, OverflowError) as error:  # sums past 64 bits
            raise InternalError(
                f"the meter's file {self._path} cannot be used: {error}",
                code="meter_failed",
                remedy="Check that its disk is not full and that it is not damaged",
            ) from error
