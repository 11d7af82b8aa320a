"""What a coordinator and its stages promise each other in writing: assignments, job tickets and receipts.

All three are deterministic CBOR in a signed envelope. Checking one is pure: time and trust are arguments, and what is
wrong with it comes back as a `Refusal`, since a refused ticket is an expected answer and not a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from azu.crossings import Crossing
from azu.identity import Identity, Kind, open_envelope, seal
from azu.wire.document import Digest, Document, PeerId, Tuple
from azu.wire.fields import MAX_TOKENS, Count, Epoch, JobId, TokenId
from azu.wire.tensors import WeightFormat

__all__ = [
    "CLOCK_SKEW_S",
    "MAX_STAGES",
    "MAX_SUCCESSORS",
    "Assignment",
    "JobTicket",
    "LoadedLayers",
    "Receipt",
    "Refusal",
    "Sampling",
    "StageEntry",
    "check_assignment",
    "check_receipt",
    "check_ticket",
    "check_times",
    "check_trust",
    "open_assignment",
    "open_receipt",
    "open_ticket",
    "sign_assignment",
    "sign_receipt",
    "sign_ticket",
]

# No published model has more layers, and a stage has at least one.
MAX_STAGES = 1_000
# Coordinators that share a ledger, besides the one that signs.
MAX_SUCCESSORS = 15
# Clocks of home machines are off by a few seconds; more than this is a clock to be set.
CLOCK_SKEW_S = 30

Layer = Annotated[int, Field(ge=0, le=MAX_STAGES)]
UnixTime = Annotated[int, Field(ge=0, lt=2**40)]
# Grows with each version that one signer signs; unix milliseconds do, over restarts too.
Sequence = Annotated[int, Field(ge=0, lt=2**63)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something signed is not accepted."""

    code: str
    message: str
    remedy: str = ""


class LoadedLayers(NamedTuple):
    """What a worker has in memory: layers [start, end) of a model of `n_layers`."""

    manifest: str
    start: int
    end: int
    n_layers: int
    dtype: WeightFormat


class Sampling(Document):
    """How the last stage picks tokens. Defaults are greedy and neutral.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 keep every token. `repetition_penalty` divides
    positive (and multiplies negative) logits of tokens seen in prompt or output (CTRL, arXiv:1909.05858);
    `presence_penalty` and `frequency_penalty` are subtracted for tokens of the output alone, as in OpenAI's API.
    """

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    min_p: Unit = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class StageEntry(Document):
    """One stage of a job: layers [start, end) at a peer.

    It is paid for positions from `paid_from` on: those before are paid to whoever left it the stage. `heir_of` is who
    may hand it the KV cache of the stage, in a ticket that is for these two alone.
    """

    peer_id: PeerId
    start: Layer
    end: Layer
    paid_from: Count = 0
    heir_of: PeerId | None = None


class JobTicket(Document):
    """A coordinator's order to a chain of stages to run one job, at an agreed price."""

    job_id: JobId
    epoch: Epoch
    manifest: Digest
    n_layers: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    stages: Annotated[Tuple[StageEntry], Field(min_length=1, max_length=MAX_STAGES)]
    dtype: WeightFormat
    prompt_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stop_tokens: Annotated[Tuple[TokenId], Field(max_length=64)]
    sampling: Sampling
    price: Annotated[int, Field(ge=0, lt=2**63)]  # smallest units per token-layer
    begun_at: UnixTime  # of the whole job: where KV cache is short, the oldest goes first
    issued_at: UnixTime
    expires_at: UnixTime
    coordinator: PeerId
    # Who else may have the job go on, by an amendment, once this coordinator is gone.
    successors: Annotated[Tuple[PeerId], Field(max_length=MAX_SUCCESSORS)] = ()

    @model_validator(mode="after")
    def _stages_cover_the_model(self) -> Self:
        position = 0
        for stage in self.stages:
            if stage.start != position or stage.end <= stage.start:
                raise ValueError("stages do not cover the layers one after the other")
            position = stage.end
        if position != self.n_layers:
            raise ValueError("stages do not cover every layer")
        return self

    @model_validator(mode="after")
    def _positions_can_be_counted(self) -> Self:
        if self.total_tokens > MAX_TOKENS:  # what a chunk's position and a receipt's tokens go up to
            raise ValueError(f"prompt_tokens and max_tokens together are more than {MAX_TOKENS}")
        return self

    @property
    def total_tokens(self) -> int:
        """The most positions that a stage's KV cache will hold for this job."""
        return self.prompt_tokens + self.max_tokens

    def bequest(self, heirs: Mapping[int, str], epoch: int, now: int) -> JobTicket:
        """A ticket for peers that get these stages' KV caches before an amendment says what they are paid for."""
        ticket = self.amended(heirs, now, dict.fromkeys(heirs, self.total_tokens), epoch=epoch)
        stages = tuple(
            stage.model_copy(update={"heir_of": self.stages[index].peer_id}) if index in heirs else stage
            for index, stage in enumerate(ticket.stages)
        )
        return ticket.model_copy(update={"stages": stages})

    def positions(self, tokens: int) -> int:
        """Positions that went through every layer where so many tokens came out: the last is sampled and never run."""
        return self.prompt_tokens + tokens - 1 if tokens else 0

    def amended(
        self,
        peers: Mapping[int, str],
        now: int,
        paid_from: Mapping[int, int] | None = None,
        *,
        epoch: int | None = None,
    ) -> JobTicket:
        """The ticket of a later epoch, issued now, with other peers in the stages of these indices.

        Args:
            paid_from: for each stage of these that is paid up to a position to the peer which it had.
            epoch: the next one where omitted.
        """
        begins = paid_from or {}
        stages = tuple(
            StageEntry(
                peer_id=peers.get(index, stage.peer_id),
                start=stage.start,
                end=stage.end,
                paid_from=begins.get(index, stage.paid_from),
            )
            for index, stage in enumerate(self.stages)
        )
        life = self.expires_at - self.issued_at
        times = {"issued_at": now, "expires_at": now + life}
        next_epoch = self.epoch + 1 if epoch is None else epoch
        return self.model_copy(update={"epoch": next_epoch, "stages": stages, **times})

    def may_be_led_by(self, coordinator: str) -> bool:
        """Whether a coordinator may have the job go on: who signed this, or whom that one named."""
        return coordinator in (self.coordinator, *self.successors)

    def stage_of(self, peer_id: str) -> int | None:
        """The index of a peer's stage, or None. A peer has at most one stage of a job (see check_ticket)."""
        return next((index for index, stage in enumerate(self.stages) if stage.peer_id == peer_id), None)


class Assignment(Document):
    """A coordinator's request to a worker to load layers [start, end) of a model and keep them."""

    worker: PeerId
    coordinator: PeerId
    manifest: Digest
    start: Layer
    end: Layer
    dtype: WeightFormat
    kv_tokens: Annotated[int, Field(ge=1, le=2**40)]  # positions of KV cache to keep room for
    sequence: Sequence  # so that an old one cannot be replayed
    expires_at: UnixTime


class Receipt(Document):
    """A stage's statement of what it did for a job, and of what it took from and gave to its neighbours.

    `received` and `sent` tell of the receipt's epoch alone, up to the positions that the coordinator counts; except in
    the first stage, which received token ids, and the last, which sent some: these tell of the whole job.
    """

    job_id: JobId
    epoch: Epoch
    stage: Annotated[int, Field(ge=0, le=MAX_STAGES)]
    peer_id: PeerId
    start: Layer
    end: Layer
    tokens: Count  # positions that went through its layers
    received: Crossing  # from its first input on
    sent: Crossing  # up to its last output
    issued_at: UnixTime


def sign_ticket(identity: Identity, ticket: JobTicket) -> bytes:
    """The ticket in its coordinator's envelope."""
    return seal(identity, Kind.JOB_TICKET, ticket.to_cbor())


def sign_assignment(identity: Identity, assignment: Assignment) -> bytes:
    """The assignment in its coordinator's envelope."""
    return seal(identity, Kind.ASSIGNMENT, assignment.to_cbor())


def sign_receipt(identity: Identity, receipt: Receipt) -> bytes:
    """The receipt in its stage's envelope."""
    return seal(identity, Kind.RECEIPT, receipt.to_cbor())


def open_ticket(data: bytes) -> tuple[str, JobTicket]:
    """The signer's peer id and the ticket. Whether it is to be honoured, `check_ticket` says.

    Raises:
        TrustError: the signature does not hold.
        ProtocolError: the content is not a ticket.
    """
    signed = open_envelope(data, Kind.JOB_TICKET)
    return signed.peer_id, JobTicket.from_cbor(signed.payload)


def open_assignment(data: bytes) -> tuple[str, Assignment]:
    """The signer's peer id and the assignment; raises as `open_ticket` does."""
    signed = open_envelope(data, Kind.ASSIGNMENT)
    return signed.peer_id, Assignment.from_cbor(signed.payload)


def open_receipt(data: bytes) -> tuple[str, Receipt]:
    """The signer's peer id and the receipt; raises as `open_ticket` does."""
    signed = open_envelope(data, Kind.RECEIPT)
    return signed.peer_id, Receipt.from_cbor(signed.payload)


def check_ticket(
    ticket: JobTicket,
    *,
    signer: str,
    sender: str,
    me: str,
    now: float,
    is_trusted: Callable[[str], bool],
    loaded: LoadedLayers | None,
) -> Refusal | None:
    """Whether the worker `me` honours a ticket that `signer` signed and `sender` handed over; None means yes.

    Its own entry may be any part of the layers that are loaded.
    """
    own = [stage for stage in ticket.stages if stage.peer_id == me]
    if signer != ticket.coordinator or sender != signer:
        return Refusal("wrong_signer", "the ticket was not signed and sent by the coordinator that it names")
    if (refusal := check_trust(signer, is_trusted)) is not None:
        return refusal
    if (timing := check_times(ticket.issued_at, ticket.expires_at, now)) is not None:
        return timing
    if len(own) != 1:
        return Refusal("not_my_stage", f"the ticket has {len(own)} stages for {me}, not one")
    if loaded is None or loaded.manifest != ticket.manifest:
        return Refusal("not_loaded", f"model {ticket.manifest[:12]} is not loaded here")
    if ticket.n_layers != loaded.n_layers:
        return Refusal("wrong_range", f"the model has {loaded.n_layers} layers, the ticket counts {ticket.n_layers}")
    if own[0].start < loaded.start or own[0].end > loaded.end:
        return Refusal(
            "wrong_range",
            f"layers {own[0].start}-{own[0].end - 1} are not among {loaded.start}-{loaded.end - 1}, "
            "which are loaded here",
        )
    if ticket.dtype != loaded.dtype:
        return Refusal("wrong_dtype", f"this worker runs {loaded.dtype}, the ticket wants {ticket.dtype}")
    return None


def check_assignment(
    assignment: Assignment,
    *,
    signer: str,
    sender: str,
    me: str,
    now: float,
    is_trusted: Callable[[str], bool],
    last_sequence: int,
) -> Refusal | None:
    """Whether the worker `me` follows an assignment that `signer` signed and `sender` handed over; None means yes."""
    if signer != assignment.coordinator or sender != signer:
        return Refusal("wrong_signer", "the assignment was not signed and sent by the coordinator that it names")
    if assignment.worker != me:
        return Refusal("not_for_me", f"the assignment is for {assignment.worker}")
    if (refusal := check_trust(signer, is_trusted)) is not None:
        return refusal
    if assignment.sequence <= last_sequence:
        return Refusal("stale", "a newer assignment was given before")
    if assignment.end <= assignment.start:
        return Refusal("wrong_range", "the assignment names no layer")
    return check_times(0, assignment.expires_at, now)


def check_receipt(receipt: Receipt, *, signer: str, ticket: JobTicket, stage: int) -> Refusal | None:
    """Whether a receipt is the given stage's, for the given ticket; None means yes. Counts are the meter's business."""
    entry = ticket.stages[stage]
    claimed = (receipt.job_id, receipt.epoch, receipt.stage, receipt.peer_id, receipt.start, receipt.end)
    if claimed != (ticket.job_id, ticket.epoch, stage, entry.peer_id, entry.start, entry.end):
        return Refusal("wrong_receipt", "the receipt is for another job, epoch or stage")
    if signer != entry.peer_id:
        return Refusal("wrong_signer", "the receipt was not signed by the stage's peer")
    return None


def check_trust(signer: str, is_trusted: Callable[[str], bool]) -> Refusal | None:
    """Whether a worker takes orders from a coordinator; None means yes."""
    if is_trusted(signer):
        return None
    return Refusal(
        "untrusted_coordinator",
        f"this worker does not serve coordinator {signer}",
        f"Its owner can allow it: azu-node join --trust {signer}",
    )


def check_times(issued_at: int, expires_at: int, now: float) -> Refusal | None:
    """Whether something signed counts now; None means yes."""
    if now > expires_at:
        return Refusal("expired", "it has expired", "Compare the clocks of both machines (NTP)")
    if issued_at > now + CLOCK_SKEW_S:
        return Refusal("from_the_future", "it was issued in the future", "Compare the clocks of both machines (NTP)")
    return None
