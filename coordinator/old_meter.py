"""What azu wrote down before it had a ledger: `meter.sqlite` in the coordinator's data folder, taken over once."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

import trio

from azu.errors import InternalError
from azu.ledger import Earning, EndedJob, Ledger
from azu.logs import log

__all__ = ["take_over_meter"]

logger = logging.getLogger(__name__)

# What it counted in was never worth anything; in another currency its numbers would be.
_CURRENCY = "units"
_AT_ONCE = 256  # jobs
_QUERY = """
SELECT jobs.job_id, jobs.epoch, manifest, settled_at, prompt_tokens, completion_tokens, jobs.token_layers, cost,
       stage, peer_id, first_layer, end_layer, tokens, stages.token_layers, earned, state, receipt
FROM jobs LEFT JOIN stages USING (job_id, epoch) ORDER BY jobs.job_id, jobs.epoch, stage
"""


async def take_over_meter(path: Path, ledger: Ledger) -> int:
    """Settle the old file's jobs in the ledger, and rename it; returns how many, 0 where there is no such file.

    Interrupted anywhere, it goes on at the next start: each job has a key of its own. A ledger in a currency of worth
    takes over nothing, and the file stays as it is.

    Raises:
        InternalError: the file cannot be read. The ledger's own.
    """
    jobs = await trio.to_thread.run_sync(_read, path)
    if not jobs:
        return 0
    if ledger.currency != _CURRENCY:
        log(logger, logging.WARNING, "old meter not taken over", file=str(path), currency=ledger.currency)
        return 0
    for first in range(0, len(jobs), _AT_ONCE):
        async with trio.open_nursery() as nursery:
            for job, settled_at in jobs[first : first + _AT_ONCE]:
                key = f"import:{job.job_id}:{job.epoch}"
                nursery.start_soon(partial(ledger.settle, job, is_free=True, key=key, at=settled_at))
    await trio.to_thread.run_sync(_put_away, path)
    log(logger, logging.INFO, "old meter taken over", jobs=len(jobs))
    return len(jobs)


def _read(path: Path) -> list[tuple[EndedJob, int]]:
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(path, timeout=10)) as db:
            return list(_jobs(db))
    except sqlite3.Error as error:
        raise InternalError(
            f"{path}, which an earlier azu wrote, cannot be read: {error}",
            code="old_meter",
            remedy="Restore it from a back-up, or move it away: what workers earned before is then not in the ledger",
        ) from error


def _jobs(db: sqlite3.Connection) -> Iterator[tuple[EndedJob, int]]:
    for (job_id, epoch), group in groupby(db.execute(_QUERY), key=lambda row: row[:2]):
        rows = list(group)
        manifest, settled_at, prompt, completion, token_layers, cost = rows[0][2:8]
        earnings = tuple(Earning(*row[9:]) for row in rows if row[8] is not None)
        yield EndedJob(job_id, epoch, manifest, prompt, completion, token_layers, cost, earnings), settled_at


def _put_away(path: Path) -> None:
    """Under another name, with what SQLite kept beside it written into it."""
    try:
        with closing(sqlite3.connect(path, timeout=10)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
        os.replace(path, path.with_name(f"{path.name}.imported"))
    except (sqlite3.Error, OSError) as error:
        log(logger, logging.WARNING, "old meter not put away", file=str(path), reason=str(error))
