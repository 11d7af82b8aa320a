"""Ended jobs that the ledger could not take, in the data folder until it can: nobody loses money by a database that is
away.

One file each, synced before the job counts as ended. What was put aside for a job stays put aside meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

import trio
from pydantic import TypeAdapter, ValidationError

from azu.durable import write_file
from azu.errors import AzuError, InternalError
from azu.ledger import EndedJob
from azu.logs import log
from azu.wire.document import decode_cbor, encode_cbor

__all__ = ["Unsettled", "is_away"]

logger = logging.getLogger(__name__)

# Settles a job, or raises InternalError.
Settle = Callable[[EndedJob], Awaitable[None]]

_RETRY_S = 15.0
_MAX_FILE_BYTES = 64 * 2**20  # a job of the most stages, each with a receipt, is far from it
_JOB = TypeAdapter(EndedJob)


def is_away(error: AzuError) -> bool:
    """Whether the ledger may take it later; other errors say that the job itself cannot be settled."""
    return error.code in ("ledger_unreachable", "ledger_failed", "ledger_closed")


class Unsettled:
    """The files of one coordinator."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "unsettled"

    async def keep(self, job: EndedJob) -> None:
        """Write a job down.

        Raises:
            InternalError: the disk does not take it either.
        """
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            await trio.to_thread.run_sync(write_file, self._folder / f"{job.job_id}.cbor", _encode(job))
        except OSError as error:
            raise InternalError(
                f"job {job.job_id} can be kept neither in the ledger nor in {self._folder}: {error.strerror}",
                code="not_settled",
            ) from error

    async def settle(self, settle: Settle) -> None:
        """Settle what is kept; what is refused or cannot be read is put aside for a person to look at.

        Raises:
            InternalError: the ledger is away.
        """
        for path in sorted(self._folder.glob("*.cbor")):
            try:
                await settle(_JOB.validate_python(decode_cbor(path.read_bytes(), limit=_MAX_FILE_BYTES)))
            except (AzuError, ValidationError) as error:
                if isinstance(error, AzuError) and is_away(error):
                    raise
                aside = path.rename(path.with_suffix(".refused"))
                log(logger, logging.ERROR, "kept job cannot be settled", file=str(aside), reason=str(error))
            else:
                path.unlink()
                log(logger, logging.INFO, "kept job settled", job=path.stem)

    async def run(self, settle: Settle) -> None:
        """Try again and again until cancelled."""
        while True:
            await trio.sleep(_RETRY_S)
            try:
                await self.settle(settle)
            except InternalError as error:
                log(logger, logging.WARNING, "kept jobs wait for the ledger", reason=str(error))


def _encode(job: EndedJob) -> bytes:
    fields = asdict(job)
    for each in (fields, *fields["earnings"]):  # amounts have no bound, and CBOR's integers have
        each |= {name: str(each[name]) for name in ("cost", "earned") if name in each}
    return encode_cbor(fields)
