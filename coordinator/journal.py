"""Streamed answers that are not complete, in the data folder: a coordinator that restarts goes on with them.

One file each, from the first token to the end of the job. Files are renamed into place, but not synced: they have to
outlive the process. After a crash of the machine the workers would have let go of the jobs before it is up again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from azu.crossings import Crossing
from azu.errors import AzuError
from azu.logs import log
from azu.tickets import JobTicket, UnixTime, open_receipt
from azu.wire.document import Digest, Document, Tuple
from azu.wire.fields import MAX_TOKENS, Count
from coordinator.agreement import Handover, Word
from coordinator.generation import known_as

__all__ = ["Journal", "Left", "StreamId", "Unfinished"]

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 4 * MAX_TOKENS + 16 * 2**20  # the prompt, and all the rest

StreamId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class StageWord(Document):
    """What a stage that stayed said of an epoch (`coordinator.agreement.Word`)."""

    stage: Count
    positions: Count
    received: Crossing
    sent: Crossing


class StageReceipt(Document):
    """The receipt of a stage that was left, in its envelope."""

    stage: Count
    envelope: bytes


class Left(Document):
    """Stages that were left properly (`coordinator.agreement.Handover`)."""

    ticket: bytes
    tokens: Count
    stages: Tuple[Count]
    receipts: Tuple[StageReceipt]
    words: Tuple[StageWord]

    @classmethod
    def of(cls, handover: Handover) -> Left:
        """As it is noted."""
        return cls(
            ticket=handover.ticket.to_cbor(),
            tokens=handover.tokens,
            stages=handover.left,
            receipts=tuple(StageReceipt(stage=n, envelope=each) for n, (each, _) in handover.receipts.items()),
            words=tuple(StageWord(stage=n, **word._asdict()) for n, word in handover.words.items()),
        )

    def handover(self) -> Handover:
        """As it was; raises ProtocolError or TrustError where it is damaged."""
        receipts = {each.stage: (each.envelope, open_receipt(each.envelope)[1]) for each in self.receipts}
        words = {each.stage: Word(each.positions, each.received, each.sent) for each in self.words}
        return Handover(JobTicket.from_cbor(self.ticket), self.tokens, self.stages, receipts, words)


class Unfinished(Document):
    """One streamed answer. prompt: token ids (`azu.wire.tokens`). ticket: the last that was signed, without envelope.
    left: what was left properly before, the earliest first.

    `stream` is what its client names it by, and told nobody else.
    """

    stream: StreamId
    created: UnixTime
    model_id: str
    manifest: Digest
    prompt: bytes
    ticket: bytes
    left: Tuple[Left] = ()
    stops: Tuple[str]
    include_usage: bool
    account: str
    wallet: str
    key_id: str | None

    @property
    def job_id(self) -> str:
        """As the ledger knows it; raises ProtocolError where the ticket is none."""
        return known_as(JobTicket.from_cbor(self.ticket).job_id)


class Journal:
    """The files. Methods block for the writing of a small one."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "streams"

    def write(self, unfinished: Unfinished) -> None:
        """Note an answer, in the place of what was noted of it before. Without a disk it does not outlive a restart."""
        place = self._place(unfinished.stream)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            temporary = place.with_suffix(".tmp")
            temporary.write_bytes(unfinished.to_cbor())
            temporary.replace(place)
        except OSError as error:
            log(logger, logging.WARNING, "stream not noted", file=str(place), reason=str(error))

    def forget(self, stream: str) -> None:
        """An answer is complete."""
        try:
            self._place(stream).unlink(missing_ok=True)
        except OSError as error:
            log(logger, logging.WARNING, "stream not forgotten", stream=stream, reason=str(error))

    def read(self) -> Sequence[Unfinished]:
        """What was noted and not forgotten; what cannot be read is deleted."""
        found: list[Unfinished] = []
        for path in sorted(self._folder.glob("*.cbor")):
            try:
                unfinished = Unfinished.from_cbor(path.read_bytes(), limit=_MAX_FILE_BYTES)
                log(logger, logging.INFO, "stream of before the restart", job=unfinished.job_id)
                found.append(unfinished)
            except (AzuError, OSError) as error:
                log(logger, logging.WARNING, "noted stream is damaged", file=str(path), reason=str(error))
                self.forget(path.stem)
        return found

    def _place(self, stream: str) -> Path:
        return self._folder / f"{stream}.cbor"
