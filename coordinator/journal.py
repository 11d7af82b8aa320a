"""What is noted of requests that outlive the coordinator's process (`azu.accounts.kept`): what was asked, and how its
jobs stand. Pure.

A stream, or a whole answer, is noted from its first token on, what is fetched later from when it is submitted, each to
the end of the last of its jobs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from azu.accounts.kept import Claimed, KeptRow, Lead
from azu.crossings import Crossing
from azu.tickets import JobTicket, Sampling, UnixTime, open_receipt
from azu.wire.document import Digest, Document, Tuple
from azu.wire.fields import MAX_TOKENS, Count, JobId, TokenId
from coordinator.agreement import Handover, Word
from coordinator.generation import JobReport, StageReport

__all__ = ["Asked", "Ended", "Kind", "Left", "Standing", "Unfinished", "row_of"]

# Bytes: token ids, and all the rest.
_MAX_ASKED = 4 * MAX_TOKENS + 2**20
_MAX_STANDING = 4 * MAX_TOKENS + 16 * 2**20

# stream: its client may come back. whole: nobody can get it any more. submitted, once: it is fetched when it is done,
# by the job's id or by the key that its client gave it.
Kind = Literal["stream", "whole", "submitted", "once"]


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


class Ended(Document):
    """A job that is complete while others of its request are not. tokens: all of it (`azu.wire.tokens`)."""

    tokens: bytes
    is_last_special: bool  # the last one stopped it, and is no text
    report: str  # JSON

    @classmethod
    def of(cls, tokens: bytes, report: JobReport, *, is_last_special: bool) -> Ended:
        """As it is noted."""
        return cls(tokens=tokens, is_last_special=is_last_special, report=json.dumps(asdict(report)))

    def job_report(self) -> JobReport:
        """As it was."""
        fields = json.loads(self.report)
        stages = [StageReport(**{**each, "against": tuple(each["against"])}) for each in fields["stages"]]
        return JobReport(**{**fields, "stages": tuple(stages)})


class Standing(Document):
    """How one job stands. ticket: the last that was signed, without envelope; empty before the first token.
    left: what was left properly before, the earliest first.
    """

    ticket: bytes = b""
    left: Tuple[Left] = ()
    ended: Ended | None = None

    def job_ticket(self) -> JobTicket | None:
        """The ticket; raises ProtocolError where it is damaged."""
        return JobTicket.from_cbor(self.ticket) if self.ticket else None


class Asked(Document):
    """What was asked: one job for each choice. prompt: token ids (`azu.wire.tokens`).

    `request_id` is what the client of a stream names it by, and told nobody else.
    """

    request_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    kind: Kind
    created: UnixTime
    model_id: str
    manifest: Digest
    prompt: bytes
    max_tokens: Count
    stop_tokens: Tuple[TokenId]
    job_ids: Tuple[JobId]
    samplings: Tuple[Sampling]
    stops: Tuple[str]
    include_usage: bool
    account: str
    wallet: str
    key_id: str | None


def row_of(asked: Asked, standings: Sequence[Standing]) -> KeptRow:
    """A request as it is noted."""
    ids = (job_id.hex() for job_id in asked.job_ids)
    jobs = tuple((job_id, standing.to_cbor()) for job_id, standing in zip(ids, standings, strict=True))
    return KeptRow(asked.request_id, asked.kind, asked.manifest, asked.wallet, asked.to_cbor(), jobs)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A request as it was claimed; `standings` by choice."""

    lead: Lead
    asked: Asked
    standings: tuple[Standing, ...]

    @classmethod
    def of(cls, claimed: Claimed) -> Unfinished:
        """Out of its documents; raises ProtocolError where one is damaged."""
        asked = Asked.from_cbor(claimed.asked, limit=_MAX_ASKED)
        standings = (Standing.from_cbor(each, limit=_MAX_STANDING) for each in claimed.standings)
        return cls(claimed.lead, asked, tuple(standings))

    def begun_anew(self) -> Unfinished:
        """The same, without the jobs that are in their middle."""
        standings = (each if each.ended is not None else Standing() for each in self.standings)
        return replace(self, standings=tuple(standings))
