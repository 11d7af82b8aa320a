"""Ended jobs that the ledger could not take, in the data folder until it can: nobody loses money by a database that is
away.

One file each, synced before the job counts as ended. What was put aside for a job stays put aside meanwhile, unless
another coordinator that shares the ledger takes the job for lost: then the platform bears what it cost.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

import trio
from pydantic import TypeAdapter, ValidationError

from azu.durable import make_folder, write_file
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
    """The files of one coordinator; a container of the ids of their jobs."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "unsettled"

    def __contains__(self, job_id: object) -> bool:
        return self._path_of(str(job_id)).exists()

    async def keep(self, job: EndedJob) -> None:
        """Write a job down.

        Raises:
            InternalError: the disk does not take it either.
        """
        try:
            await trio.to_thread.run_sync(_write, self._path_of(job.job_id), _encode(job))
        except OSError as error:
            raise InternalError(
                f"job {job.job_id} can be kept neither in the ledger nor in {self._folder}: {error.strerror}",
                code="not_settled",
            ) from error

    async def settle(self, settle: Settle) -> None:
        """Settle what is kept, but for what another coordinator leads now: that is left until it has ended there. What
        is refused or cannot be read is put aside for a person to look at.

        Raises:
            InternalError: the ledger is away, or the folder cannot be used.
        """
        try:
            for path in sorted(self._folder.glob("*.cbor")):
                await self._settle(path, settle)
        except OSError as error:
            raise InternalError(f"{self._folder} cannot be used: {error.strerror}", code="not_settled") from error

    async def _settle(self, path: Path, settle: Settle) -> None:
        try:
            await settle(_read(path))
        except (AzuError, ValidationError) as error:
            if isinstance(error, AzuError) and is_away(error):
                raise
            if isinstance(error, AzuError) and error.code == "led_elsewhere":
                return
            _put_aside(path, reason=str(error))
        else:
            _remove(path)

    def _path_of(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.cbor"

    async def run(self, settle: Settle) -> None:
        """Try again and again until cancelled."""
        while True:
            await trio.sleep(_RETRY_S)
            try:
                await self.settle(settle)
            except InternalError as error:
                log(logger, logging.WARNING, "kept jobs are not settled yet", reason=str(error))


def _write(path: Path, data: bytes) -> None:
    make_folder(path.parent)
    write_file(path, data)


def _read(path: Path) -> EndedJob:
    return _JOB.validate_python(decode_cbor(path.read_bytes(), limit=_MAX_FILE_BYTES))


def _put_aside(path: Path, reason: str) -> None:
    aside = path.rename(path.with_suffix(".refused"))
    log(logger, logging.ERROR, "kept job cannot be settled", file=str(aside), reason=reason)


def _remove(path: Path) -> None:
    path.unlink()
    log(logger, logging.INFO, "kept job settled", job=path.stem)


def _encode(job: EndedJob) -> bytes:
    fields = asdict(job)
    for each in (fields, *fields["earnings"]):  # amounts have no bound, and CBOR's integers have
        each |= {name: str(each[name]) for name in ("cost", "earned") if name in each}
    return encode_cbor(fields)
