"""Records: what may lie in the DHT under whose key, which of several counts, and for how long."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from azu.errors import ProtocolError, TrustError
from azu.identity import Identity, Kind, seal
from azu.overlay import MAX_RECORD_BYTES as OVERLAY_LIMIT
from azu.records import (
    COORDINATOR_NAMESPACE,
    COORDINATORS_KEY,
    MAX_LINKS,
    MAX_RECORD_BYTES,
    VALIDATORS,
    WORKER_NAMESPACE,
    WORKERS_KEY,
    CoordinatorRecord,
    Speed,
    WorkerRecord,
    coordinator_key,
    is_live,
    open_coordinator_record,
    open_worker_record,
    sign_coordinator_record,
    sign_worker_record,
    worker_key,
)
from azu.tickets import CLOCK_SKEW_S
from azu.wire.document import encode_cbor

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
COMMON: dict[str, Any] = {
    "peer_id": ALICE.peer_id,
    "sequence": 7,
    "issued_at": 1_000,
    "expires_at": 1_090,
    "agent": "azu-node/0.1.0",
    "protocols": ("/azu/job/1",),
    "addrs": ("/ip4/127.0.0.1/tcp/4001",),
}
WORKER = COMMON | {
    "device": "CPU (2 threads)",
    "dtype": "float32",
    "vram_total": 8 << 30,
    "vram_free": 4 << 30,
    "kv_tokens": 10_000,
    "kv_tokens_free": 9_000,
    "jobs": 1,
    "layer_us": 900,
    "ranges": ({"manifest": "c" * 64, "start": 0, "end": 12, "state": "loaded"},),
    "payout_address": "",
}
COORDINATOR = COMMON | {
    "models": (
        {"model_id": "owner/model", "manifest": "c" * 64, "n_layers": 30, "least_bytes": {"float32": 9, "int4": 2}},
    )
}
VALIDATOR = VALIDATORS[WORKER_NAMESPACE]


def worker(**changes: Any) -> WorkerRecord:
    return WorkerRecord.model_validate(WORKER | changes)


def coordinator(**changes: Any) -> CoordinatorRecord:
    return CoordinatorRecord.model_validate(COORDINATOR | changes)


def test_records_open_to_what_was_signed() -> None:
    assert open_worker_record(sign_worker_record(ALICE, worker())) == worker()
    assert open_coordinator_record(sign_coordinator_record(ALICE, coordinator())) == coordinator()


def test_an_older_workers_record_opens() -> None:
    """It does not tell its speed, who waits, and how far others are."""
    new = {"speed", "waiting", "links"}
    old = {name: value for name, value in worker().model_dump().items() if name not in new}
    opened = open_worker_record(seal(ALICE, Kind.WORKER_RECORD, encode_cbor(old)))
    assert opened == worker()
    assert (opened.speed, opened.waiting, opened.links) == (Speed(), 0, ())


def test_the_fullest_record_of_a_worker_fits() -> None:
    """A relayed address has about 200 characters at most, and a worker tells of 48 ranges."""
    full = worker(
        protocols=("/azu/control/1", "/azu/layers/1", "/azu/job/1", "/azu/ring/1"), addrs=("x" * 200,) * 16,
        device="d" * 128, vram_total=2**62, vram_free=2**62, kv_tokens=2**40, kv_tokens_free=2**40,
        ranges=({"manifest": "c" * 64, "start": 500, "end": 600, "state": "loading", "percent": 99},) * 48,
        payout_address="p" * 64, speed={"decode_base_ns": 2**39, "decode_token_ns": 2**39, "prefill_ns": 2**39},
        links=({"peer_id": BOB.peer_id, "rtt_us": 2**30, "bytes_per_s": 2**40, "relayed": True},) * MAX_LINKS,
    )  # fmt: skip
    assert len(sign_worker_record(ALICE, full)) < MAX_RECORD_BYTES - 512


@pytest.mark.parametrize(
    "changes",
    [
        {"speed": None}, {"speed": {"decode_base_ns": -1}}, {"speed": {"prefill_ns": 2**40}}, {"speed": {"x": 1}},
        {"waiting": -1}, {"waiting": 0.5}, {"links": ({"peer_id": "x"},)}, {"links": ({"rtt_us": 1},)},
        {"links": ({"peer_id": BOB.peer_id, "rtt_us": 2**31},)}, {"links": ({"peer_id": BOB.peer_id, "relayed": 1},)},
        {"links": ({"peer_id": BOB.peer_id},) * (MAX_LINKS + 1)},
    ],
)  # fmt: skip
def test_measurements_out_of_bounds_are_no_record(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        worker(**changes)
    with pytest.raises(ProtocolError):
        open_worker_record(seal(ALICE, Kind.WORKER_RECORD, encode_cbor(worker().model_dump() | changes)))


def test_both_namespaces_have_a_validator() -> None:
    assert set(VALIDATORS) == {WORKER_NAMESPACE, COORDINATOR_NAMESPACE}
    VALIDATOR.validate(worker_key(ALICE.peer_id), sign_worker_record(ALICE, worker()))
    VALIDATORS[COORDINATOR_NAMESPACE].validate(
        coordinator_key(ALICE.peer_id), sign_coordinator_record(ALICE, coordinator())
    )


@pytest.mark.parametrize(
    "key",
    [
        worker_key(BOB.peer_id),
        f"/azu-worker/x/{ALICE.peer_id}",
        f"/azu-worker//{ALICE.peer_id}",
        f"/azu-worker/{ALICE.peer_id}/",
        f"/azu-worker/{ALICE.peer_id}/x",
        "/azu-worker/",
        "",
        ALICE.peer_id,
    ],
)
def test_a_record_lies_under_its_owners_key_alone(key: str) -> None:
    with pytest.raises(TrustError) as raised:
        VALIDATOR.validate(key, sign_worker_record(ALICE, worker()))
    assert raised.value.code == "wrong_key"


def test_nobody_signs_for_another() -> None:
    forged = sign_worker_record(BOB, worker(peer_id=ALICE.peer_id))
    for key in (worker_key(ALICE.peer_id), worker_key(BOB.peer_id)):
        with pytest.raises(TrustError) as raised:
            VALIDATOR.validate(key, forged)
        assert raised.value.code == "wrong_signer"


def test_one_kind_of_record_is_never_taken_for_the_other() -> None:
    with pytest.raises(TrustError):
        open_worker_record(sign_coordinator_record(ALICE, coordinator()))
    with pytest.raises(TrustError):
        open_coordinator_record(sign_worker_record(ALICE, worker()))
    with pytest.raises(ProtocolError):  # signed as a worker's record, but not one
        open_worker_record(seal(ALICE, Kind.WORKER_RECORD, coordinator().to_cbor()))


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(TrustError):
        VALIDATOR.validate(worker_key(ALICE.peer_id), data)


@given(st.data())
def test_a_changed_byte_is_refused(data: st.DataObject) -> None:
    value = bytearray(sign_worker_record(ALICE, worker()))
    value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TrustError):
        VALIDATOR.validate(worker_key(ALICE.peer_id), bytes(value))


def test_a_record_over_the_limit_is_refused_though_signed() -> None:
    big = seal(ALICE, Kind.WORKER_RECORD, bytes(MAX_RECORD_BYTES))
    with pytest.raises(TrustError) as raised:
        open_worker_record(big)
    assert raised.value.code == "too_large"
    assert MAX_RECORD_BYTES <= OVERLAY_LIMIT


def test_a_busy_workers_record_fits() -> None:
    held = {"manifest": "c" * 64, "start": 999, "end": 1_000, "state": "loading"}
    full = worker(addrs=("/ip6/2001:db8:1111:2222:3333:4444:5555:6666/tcp/65535/p2p/" + "x" * 60,) * 16,
                  ranges=(held,) * 64, protocols=("/azu/something/1",) * 16)  # fmt: skip
    assert len(sign_worker_record(ALICE, full)) <= MAX_RECORD_BYTES


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6))
def test_the_highest_sequence_counts(sequences: list[int]) -> None:
    values = [sign_worker_record(ALICE, worker(sequence=sequence)) for sequence in sequences]
    assert sequences[VALIDATOR.select(worker_key(ALICE.peer_id), values)] == max(sequences)


@pytest.mark.parametrize(
    ("now", "live"),
    [
        (1_000 - CLOCK_SKEW_S - 1, False),
        (1_000 - CLOCK_SKEW_S, True),
        (1_000, True),
        (1_090, True),
        (1_090.001, False),
        (10**9, False),
    ],
)
def test_a_record_is_in_force_between_its_times(now: float, live: bool) -> None:
    assert is_live(worker(), now) is live


def test_the_range_of_a_model_in_a_state() -> None:
    held = [
        {"manifest": "d" * 64, "start": 0, "end": 5, "state": "cached"},
        {"manifest": "c" * 64, "start": 3, "end": 9, "state": "cached"},
        {"manifest": "c" * 64, "start": 4, "end": 6, "state": "loaded"},
    ]
    record = worker(ranges=held)
    assert record.range_in("cached", "c" * 64) == (3, 9)
    assert record.range_in("loaded", "c" * 64) == (4, 6)
    assert record.range_in("loading", "c" * 64) is None
    assert record.range_in("loaded", "d" * 64) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"vram_total": -1}, {"vram_total": 2**63}, {"jobs": "1"}, {"dtype": "int2"}, {"agent": "a" * 65},
        {"addrs": ("a",) * 17}, {"addrs": ("a" * 257,)}, {"protocols": ("p",) * 17}, {"peer_id": "nobody"},
        {"ranges": ({"manifest": "c" * 64, "start": 0, "end": 1, "state": "imagined"},)}, {"extra": 1},
        {"ranges": ({"manifest": "c" * 64, "start": 0, "end": 1_001, "state": "loaded"},)}, {"sequence": -1},
    ],
)  # fmt: skip
def test_fields_out_of_bounds_are_no_record(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        worker(**changes)


def test_provider_keys_are_digests_and_differ() -> None:
    assert len(WORKERS_KEY) == len(COORDINATORS_KEY) == hashlib.sha256().digest_size
    assert WORKERS_KEY != COORDINATORS_KEY
