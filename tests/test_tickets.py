"""Tickets, assignments and receipts: each thing that may be wrong with one has its own refusal."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from azu.errors import ProtocolError, TrustError
from azu.identity import Identity, Kind, seal
from azu.tickets import (
    CLOCK_SKEW_S,
    MAX_STAGES,
    MAX_SUCCESSORS,
    Assignment,
    JobTicket,
    LoadedLayers,
    Receipt,
    Refusal,
    Sampling,
    check_assignment,
    check_receipt,
    check_ticket,
    open_assignment,
    open_receipt,
    open_ticket,
    sign_assignment,
    sign_receipt,
    sign_ticket,
)
from azu.wire.document import encode_cbor
from azu.wire.messages import MAX_TOKENS

COORDINATOR, ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in range(1, 5))
MANIFEST = "c" * 64
NOW = 1_800_000_000.5

TICKET: dict[str, Any] = {
    "job_id": b"j" * 16,
    "epoch": 0,
    "manifest": MANIFEST,
    "n_layers": 10,
    "stages": (
        {"peer_id": ALICE.peer_id, "start": 0, "end": 6},
        {"peer_id": BOB.peer_id, "start": 6, "end": 10},
    ),
    "dtype": "float16",
    "prompt_tokens": 5,
    "max_tokens": 7,
    "stop_tokens": (2,),
    "sampling": {},
    "price": 2,
    **dict.fromkeys(("begun_at", "issued_at"), int(NOW) - 1),
    "expires_at": int(NOW) + 60,
    "coordinator": COORDINATOR.peer_id,
}
ASSIGNMENT: dict[str, Any] = {
    "worker": BOB.peer_id,
    "coordinator": COORDINATOR.peer_id,
    "manifest": MANIFEST,
    "start": 6,
    "end": 10,
    "dtype": "float16",
    "kv_tokens": 4096,
    "sequence": 10,
    "expires_at": int(NOW) + 60,
}
RECEIPT: dict[str, Any] = {
    "job_id": b"j" * 16,
    "epoch": 0,
    "stage": 1,
    "peer_id": BOB.peer_id,
    "start": 6,
    "end": 10,
    "tokens": 11,
    "received": {"start": 0, "end": 11, "digest": "1" * 64},
    "sent": {"start": 0, "end": 11, "digest": "2" * 64},
    "issued_at": int(NOW),
}
LOADED = LoadedLayers(MANIFEST, 6, 10, 10, "float16")


def ticket(**changes: Any) -> JobTicket:
    return JobTicket.model_validate(TICKET | changes)


def check(subject: JobTicket, **changes: Any) -> str:
    """The refusal's code, "" where it is accepted."""
    given: dict[str, Any] = {
        "signer": COORDINATOR.peer_id,
        "sender": COORDINATOR.peer_id,
        "me": BOB.peer_id,
        "now": NOW,
        "is_trusted": lambda peer_id: peer_id == COORDINATOR.peer_id,
        "loaded": LOADED,
    }
    return code_of(check_ticket(subject, **(given | changes)))


def code_of(refusal: Refusal | None) -> str:
    if refusal is None:
        return ""
    assert refusal.message
    return refusal.code


# --- tickets


def test_a_good_ticket_is_accepted() -> None:
    assert check(ticket()) == ""
    assert ticket().stage_of(ALICE.peer_id) == 0
    assert ticket().stage_of(BOB.peer_id) == 1
    assert ticket().stage_of(EVE.peer_id) is None
    assert ticket().total_tokens == 12


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("wrong_signer", {"signer": EVE.peer_id}),
        ("wrong_signer", {"sender": EVE.peer_id}),
        ("wrong_signer", {"signer": EVE.peer_id, "sender": EVE.peer_id}),
        ("untrusted_coordinator", {"is_trusted": lambda _: False}),
        ("expired", {"now": TICKET["expires_at"] + 0.001}),
        ("from_the_future", {"now": TICKET["issued_at"] - CLOCK_SKEW_S - 1}),
        ("not_my_stage", {"me": EVE.peer_id}),
        ("not_loaded", {"loaded": None}),
        ("not_loaded", {"loaded": LOADED._replace(manifest="d" * 64)}),
        ("wrong_range", {"loaded": LOADED._replace(n_layers=12)}),  # the tenth layer is not the model's last
        ("wrong_dtype", {"loaded": LOADED._replace(dtype="bfloat16")}),
        ("", {"now": float(TICKET["expires_at"])}),
        ("", {"now": TICKET["issued_at"] - CLOCK_SKEW_S}),
    ],
)
def test_what_may_be_wrong_with_a_ticket(code: str, changes: dict[str, Any]) -> None:
    assert check(ticket(), **changes) == code


@given(st.integers(0, 9), st.integers(1, 10))
def test_a_stage_is_any_part_of_what_is_loaded(first: int, end: int) -> None:
    expected = "" if first <= 6 and end >= 10 else "wrong_range"
    assert check(ticket(), loaded=LOADED._replace(start=first, end=end)) == expected


def test_a_peer_has_one_stage_at_most() -> None:
    stages = [
        {"peer_id": BOB.peer_id, "start": 0, "end": 6},
        {"peer_id": ALICE.peer_id, "start": 6, "end": 8},
        {"peer_id": BOB.peer_id, "start": 8, "end": 10},
    ]
    assert check(ticket(stages=stages)) == "not_my_stage"


def test_a_refusal_of_trust_says_how_to_give_it() -> None:
    refusal = check_ticket(
        ticket(),
        signer=COORDINATOR.peer_id,
        sender=COORDINATOR.peer_id,
        me=BOB.peer_id,
        now=NOW,
        is_trusted=lambda _: False,
        loaded=LOADED,
    )
    assert refusal is not None
    assert f"--trust {COORDINATOR.peer_id}" in refusal.remedy


boundaries = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5)


@given(boundaries)
def test_only_chains_that_cover_every_layer_once_in_order_are_tickets(ranges: list[tuple[int, int]]) -> None:
    run_through = [layer for start, end in ranges for layer in range(start, end)]
    covers = run_through == list(range(10)) and all(start < end for start, end in ranges)
    stages = [{"peer_id": ALICE.peer_id, "start": start, "end": end} for start, end in ranges]
    if covers:
        assert len(ticket(stages=stages).stages) == len(ranges)
    else:
        with pytest.raises(ValidationError, match="cover"):
            ticket(stages=stages)


@given(st.lists(st.integers(1, 9), unique=True, max_size=9).map(sorted))
def test_every_cut_of_the_layers_is_a_ticket(cuts: list[int]) -> None:
    ranges = list(zip([0, *cuts], [*cuts, 10], strict=True))
    stages = [{"peer_id": ALICE.peer_id, "start": start, "end": end} for start, end in ranges]
    subject = ticket(stages=stages)
    assert [(stage.start, stage.end) for stage in subject.stages] == ranges
    assert JobTicket.from_cbor(subject.to_cbor()) == subject


@pytest.mark.parametrize(
    "changes",
    [
        {"job_id": b"short"}, {"job_id": "j" * 16}, {"epoch": -1}, {"manifest": "C" * 64}, {"n_layers": 0},
        {"n_layers": MAX_STAGES + 1}, {"n_layers": 11}, {"stages": ()}, {"dtype": "int2"}, {"prompt_tokens": 0},
        {"prompt_tokens": MAX_TOKENS + 1}, {"max_tokens": 0}, {"max_tokens": 1_048_577}, {"max_tokens": 7.0},
        {"stop_tokens": (-1,)}, {"stop_tokens": (2**31,)}, {"stop_tokens": (1,) * 65}, {"stop_tokens": (True,)},
        {"price": -1}, {"price": 2**63}, {"price": 0.5}, {"issued_at": -1}, {"expires_at": 2**40},
        {"expires_at": math.inf}, {"coordinator": "nobody"}, {"successors": ("nobody",)},
        {"successors": (EVE.peer_id,) * (MAX_SUCCESSORS + 1)}, {"sampling": None}, {"sampling": {"beam": 2}},
        {"extra": 1},
    ],
)  # fmt: skip
def test_fields_out_of_bounds_are_no_ticket(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ticket(**changes)
    with pytest.raises(ProtocolError):
        JobTicket.from_cbor(encode_cbor(TICKET | changes))


def test_a_tickets_positions_fit_the_messages_that_carry_them() -> None:
    """Positions and receipts count up to MAX_TOKENS: a job that would pass it could start but never end."""
    ticket(prompt_tokens=MAX_TOKENS - 7)
    with pytest.raises(ValidationError):
        ticket(prompt_tokens=MAX_TOKENS - 6)


# --- sampling

BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0.0, 0.7, 2.0], [-0.01, 2.01]),
    "top_p": ([0.001, 1.0], [0.0, -0.1, 1.01]),
    "top_k": ([0, 1, 2**31], [-1, 2**31 + 1, 1.5]),
    "min_p": ([0.0, 1.0], [-0.01, 1.01]),
    "repetition_penalty": ([0.1, 1.0, 10.0], [0.0, -1.0, 10.1]),
    "presence_penalty": ([-2.0, 2.0], [-2.01, 2.01]),
    "frequency_penalty": ([-2.0, 2.0], [-2.01, 2.01]),
    "seed": ([0, 2**63 - 1], [-1, 2**63, 0.5]),
}


def test_every_sampling_parameter_has_bounds_here() -> None:
    assert set(BOUNDS) == set(Sampling.model_fields)


@pytest.mark.parametrize("name", list(BOUNDS))
def test_sampling_bounds(name: str) -> None:
    allowed, refused = BOUNDS[name]
    for value in allowed:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in [*refused, math.nan, math.inf, -math.inf, "1", None, True, b"1"]:
        with pytest.raises(ValidationError):
            Sampling(**{name: value})
        with pytest.raises(ProtocolError):
            Sampling.from_cbor(encode_cbor({name: value}))


@given(st.floats(0.0, 2.0), st.floats(0.0, 1.0, exclude_min=True), st.integers(0, 2**63 - 1))
def test_sampling_is_the_same_after_its_journey(temperature: float, top_p: float, seed: int) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    assert Sampling.from_cbor(sampling.to_cbor()) == sampling


# --- assignments


def check_order(last_sequence: int = 9, **changes: Any) -> str:
    given: dict[str, Any] = {
        "signer": COORDINATOR.peer_id,
        "sender": COORDINATOR.peer_id,
        "me": BOB.peer_id,
        "now": NOW,
        "is_trusted": lambda peer_id: peer_id == COORDINATOR.peer_id,
    }
    fields = {name: changes.pop(name) for name in list(changes) if name in ASSIGNMENT}
    assignment = Assignment.model_validate(ASSIGNMENT | fields)
    return code_of(check_assignment(assignment, **(given | changes), last_sequence=last_sequence))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("", {}),
        ("", {"last_sequence": -1, "sequence": 0}),
        ("", {"now": float(ASSIGNMENT["expires_at"])}),
        ("wrong_signer", {"signer": EVE.peer_id}),
        ("wrong_signer", {"sender": EVE.peer_id}),
        ("wrong_signer", {"coordinator": EVE.peer_id}),
        ("not_for_me", {"me": ALICE.peer_id}),
        ("not_for_me", {"worker": ALICE.peer_id}),
        ("untrusted_coordinator", {"is_trusted": lambda _: False}),
        ("stale", {"last_sequence": 10}),
        ("stale", {"last_sequence": 11}),
        ("wrong_range", {"start": 10}),
        ("wrong_range", {"start": 11}),
        ("expired", {"now": ASSIGNMENT["expires_at"] + 0.001}),
    ],
)
def test_what_may_be_wrong_with_an_assignment(code: str, changes: dict[str, Any]) -> None:
    assert check_order(**changes) == code


# --- receipts


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("", {}),
        ("", {"tokens": 0}),
        ("wrong_receipt", {"job_id": b"k" * 16}),
        ("wrong_receipt", {"epoch": 1}),
        ("wrong_receipt", {"stage": 0}),
        ("wrong_receipt", {"peer_id": ALICE.peer_id}),
        ("wrong_receipt", {"start": 5}),
        ("wrong_receipt", {"end": 11}),
    ],
)
def test_what_may_be_wrong_with_a_receipt(code: str, changes: dict[str, Any]) -> None:
    receipt = Receipt.model_validate(RECEIPT | changes)
    assert code_of(check_receipt(receipt, signer=BOB.peer_id, ticket=ticket(), stage=1)) == code


def test_a_receipt_is_signed_by_its_own_stage() -> None:
    receipt = Receipt.model_validate(RECEIPT)
    for signer in (ALICE, COORDINATOR, EVE):
        assert code_of(check_receipt(receipt, signer=signer.peer_id, ticket=ticket(), stage=1)) == "wrong_signer"


# --- in their envelopes


def test_signed_documents_open_to_who_signed_what() -> None:
    assignment, receipt = Assignment.model_validate(ASSIGNMENT), Receipt.model_validate(RECEIPT)
    assert open_ticket(sign_ticket(COORDINATOR, ticket())) == (COORDINATOR.peer_id, ticket())
    assert open_assignment(sign_assignment(COORDINATOR, assignment)) == (COORDINATOR.peer_id, assignment)
    assert open_receipt(sign_receipt(BOB, receipt)) == (BOB.peer_id, receipt)


def test_one_kind_is_never_taken_for_another() -> None:
    assignment, receipt = Assignment.model_validate(ASSIGNMENT), Receipt.model_validate(RECEIPT)
    for envelope in (sign_assignment(COORDINATOR, assignment), sign_receipt(BOB, receipt)):
        with pytest.raises(TrustError) as raised:
            open_ticket(envelope)
        assert raised.value.code == "wrong_kind"
    for opener in (open_assignment, open_receipt):
        with pytest.raises(TrustError):
            opener(sign_ticket(COORDINATOR, ticket()))


@given(st.binary(max_size=200))
def test_a_signature_does_not_make_garbage_a_ticket(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        open_ticket(seal(COORDINATOR, Kind.JOB_TICKET, payload))


@given(st.binary(max_size=200))
def test_garbage_is_no_ticket(data: bytes) -> None:
    with pytest.raises(TrustError):
        open_ticket(data)
