"""What nodes say of themselves in the DHT: worker records and coordinator records.

A record is deterministic CBOR in its owner's signed envelope, stored under /azu-worker/<peer id> or
/azu-coordinator/<peer id>. The validators here are pure: they let no record into the DHT whose signature, owner or size
does not hold, and pick the newest of several. Expiry is judged by the reader, who has a clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from azu.errors import TrustError
from azu.identity import Identity, Kind, open_envelope, seal
from azu.tickets import CLOCK_SKEW_S, Layer, UnixTime
from azu.tickets import Sequence as SequenceNumber
from azu.wire.document import Digest, Document, PeerId, Tuple
from azu.wire.tensors import WeightFormat

__all__ = [
    "COORDINATORS_KEY",
    "COORDINATOR_NAMESPACE",
    "MAX_LINKS",
    "MAX_RECORD_BYTES",
    "VALIDATORS",
    "WORKERS_KEY",
    "WORKER_NAMESPACE",
    "CoordinatorRecord",
    "HeldRange",
    "Link",
    "ModelOffer",
    "Record",
    "SignedRecordValidator",
    "Speed",
    "WorkerRecord",
    "coordinator_key",
    "is_live",
    "open_coordinator_record",
    "open_worker_record",
    "sign_coordinator_record",
    "sign_worker_record",
    "worker_key",
]

WORKER_NAMESPACE = "azu-worker"
COORDINATOR_NAMESPACE = "azu-coordinator"
# Provider keys (32 bytes) under which every worker and every coordinator can be found.
WORKERS_KEY = hashlib.sha256(b"/azu/workers/1").digest()
COORDINATORS_KEY = hashlib.sha256(b"/azu/coordinators/1").digest()
# A record with 16 addresses, 48 ranges and 16 links has about 9 KiB.
MAX_RECORD_BYTES = 12_288
MAX_LINKS = 16

Address = Annotated[str, Field(max_length=256)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Small = Annotated[int, Field(ge=0, lt=2**31)]
Nanoseconds = Annotated[int, Field(ge=0, lt=2**40)]


class HeldRange(Document):
    """Layers [start, end) of a model at a worker: on its disk, on its way into memory, or ready to run.

    `percent` says how much of a loading range's files is on the worker's disk.
    """

    manifest: Digest
    start: Layer
    end: Layer
    state: Literal["cached", "loading", "loaded"]
    percent: Annotated[int, Field(ge=0, le=100)] = 0


class Record(Document):
    """What every record has. Times are unix seconds."""

    peer_id: PeerId
    sequence: SequenceNumber
    issued_at: UnixTime
    expires_at: UnixTime
    agent: Annotated[str, Field(max_length=64)]
    protocols: Annotated[Tuple[Annotated[str, Field(max_length=64)]], Field(max_length=16)]
    addrs: Annotated[Tuple[Address], Field(max_length=16)]


class Speed(Document):
    """What passes take per layer, as measured lately; 0 where nothing was.

    Decoding a token of each of n jobs takes `decode_base_ns + n * decode_token_ns`, n tokens of prompts `n *
    prefill_ns`. What only the first and last layers do counts as theirs and is spread over all.
    """

    decode_base_ns: Nanoseconds = 0
    decode_token_ns: Nanoseconds = 0
    prefill_ns: Nanoseconds = 0


class Link(Document):
    """How far another peer is, as measured lately; 0 where that was not. `bytes_per_s`: in ring messages to it."""

    peer_id: PeerId
    rtt_us: Small = 0
    bytes_per_s: Bytes = 0
    relayed: bool = False


class WorkerRecord(Record):
    """A worker's offer. Memory in bytes; `layer_us` is microseconds per decoded token and layer of a job that is alone,
    when the layers were loaded, 0 if not measured. `waiting`: jobs' steps that wait for their pass, as a mean of the
    last minute. `leaving`: it takes no new jobs and no layers. `assigned_by`: the coordinator whose layers it holds,
    while that is connected to it. What older workers do not tell has a default.
    """

    device: Annotated[str, Field(max_length=128)]
    dtype: WeightFormat
    vram_total: Bytes
    vram_free: Bytes
    kv_tokens: Bytes  # positions of KV cache that all jobs together may reserve beside what is loaded
    kv_tokens_free: Bytes  # of these, what a new job may begin with now
    jobs: Small
    layer_us: Small
    ranges: Annotated[Tuple[HeldRange], Field(max_length=64)]
    payout_address: Annotated[str, Field(max_length=128)]
    speed: Speed = Speed()
    waiting: Small = 0
    links: Annotated[Tuple[Link], Field(max_length=MAX_LINKS)] = ()
    leaving: bool = False
    assigned_by: PeerId | Literal[""] = ""

    def range_in(self, state: str, manifest: str) -> tuple[int, int] | None:
        """The [start, end) of a model that is in the given state, if any."""
        found = (held for held in self.ranges if held.state == state and held.manifest == manifest)
        return next(((held.start, held.end) for held in found), None)


class ModelOffer(Document):
    """A model that a coordinator publishes and plans for."""

    model_id: Annotated[str, Field(min_length=1, max_length=256)]
    manifest: Digest
    n_layers: Layer
    # The smallest stage that is ever assigned, with its KV cache, in each format in which that is known.
    least_bytes: Annotated[dict[Annotated[str, Field(max_length=16)], Bytes], Field(max_length=16)]


class CoordinatorRecord(Record):
    """The models that a coordinator publishes and plans for."""

    models: Annotated[Tuple[ModelOffer], Field(max_length=64)]


AnyRecord = TypeVar("AnyRecord", bound=Record)


def worker_key(peer_id: str) -> str:
    """The DHT key of a worker's record."""
    return f"/{WORKER_NAMESPACE}/{peer_id}"


def coordinator_key(peer_id: str) -> str:
    """The DHT key of a coordinator's record."""
    return f"/{COORDINATOR_NAMESPACE}/{peer_id}"


def sign_worker_record(identity: Identity, record: WorkerRecord) -> bytes:
    """The record in its worker's envelope."""
    return seal(identity, Kind.WORKER_RECORD, record.to_cbor())


def sign_coordinator_record(identity: Identity, record: CoordinatorRecord) -> bytes:
    """The record in its coordinator's envelope."""
    return seal(identity, Kind.COORDINATOR_RECORD, record.to_cbor())


def open_worker_record(data: bytes) -> WorkerRecord:
    """A worker's record out of hostile bytes.

    Raises:
        TrustError: the signature does not hold, or the signer is not the peer that the record names.
        ProtocolError: the content is not a worker record.
    """
    return _open(data, Kind.WORKER_RECORD, WorkerRecord)


def open_coordinator_record(data: bytes) -> CoordinatorRecord:
    """A coordinator's record out of hostile bytes; raises as `open_worker_record` does."""
    return _open(data, Kind.COORDINATOR_RECORD, CoordinatorRecord)


def is_live(record: Record, now: float) -> bool:
    """Whether a record is in force at `now` (unix seconds)."""
    return record.issued_at - CLOCK_SKEW_S <= now <= record.expires_at


def _open(data: bytes, kind: Kind, record_type: type[AnyRecord]) -> AnyRecord:
    if len(data) > MAX_RECORD_BYTES:
        raise TrustError(f"a record of {len(data)} bytes is over the limit of {MAX_RECORD_BYTES}", code="too_large")
    signed = open_envelope(data, kind)
    record = record_type.from_cbor(signed.payload)
    if record.peer_id != signed.peer_id:
        raise TrustError("a record is not signed by the peer that it describes", code="wrong_signer")
    return record


class SignedRecordValidator:
    """Validates one namespace of the DHT (see azu.overlay.RecordValidator)."""

    def __init__(self, kind: Kind, record_type: type[Record]) -> None:
        self._kind = kind
        self._record_type = record_type

    def validate(self, key: str, value: bytes) -> None:
        """Accept `value` under `key` (/<namespace>/<peer id>).

        Raises:
            TrustError: signature, size or owner does not hold.
            ProtocolError: the content is not such a record.
        """
        record = _open(value, self._kind, self._record_type)
        if key.split("/", 2)[2:] != [record.peer_id]:
            raise TrustError("a record lies under another peer's key", code="wrong_key")

    def select(self, key: str, values: Sequence[bytes]) -> int:
        """The index of the newest of several valid records: the one with the highest sequence number."""
        sequences = [_open(value, self._kind, self._record_type).sequence for value in values]
        return sequences.index(max(sequences))


VALIDATORS: Mapping[str, SignedRecordValidator] = {
    WORKER_NAMESPACE: SignedRecordValidator(Kind.WORKER_RECORD, WorkerRecord),
    COORDINATOR_NAMESPACE: SignedRecordValidator(Kind.COORDINATOR_RECORD, CoordinatorRecord),
}
