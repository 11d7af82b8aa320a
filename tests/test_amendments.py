"""Whether a stage of a running job goes on by another ticket."""

from __future__ import annotations

from typing import Any

import pytest

from azu.amendments import check_amendment
from azu.identity import Identity
from azu.tickets import CLOCK_SKEW_S, JobTicket
from tests.test_tickets import ALICE, BOB, COORDINATOR, EVE, NOW, TICKET, code_of, ticket


def amend(new: JobTicket, old: JobTicket, signer: Identity = COORDINATOR, *, is_trusted: bool = True) -> str:
    me, trust = BOB.peer_id, lambda _: is_trusted
    return code_of(check_amendment(new, old, signer=signer.peer_id, me=me, now=NOW, is_trusted=trust))


def test_an_amendment_puts_other_peers_into_other_stages() -> None:
    old = ticket(expires_at=int(NOW) + 59)
    new = old.amended({0: EVE.peer_id}, int(NOW), {0: 9})
    assert [(stage.peer_id, stage.paid_from) for stage in new.stages] == [(EVE.peer_id, 9), (BOB.peer_id, 0)]
    assert (new.epoch, new.issued_at, new.expires_at) == (1, int(NOW), int(NOW) + 60)
    assert {amend(each, old) for each in (new, old.model_copy(update={"epoch": 7}))} == {""}


def test_an_amendment_may_put_several_stages_in_the_place_of_another() -> None:
    """And one in the place of several, as long as a stage that stays has its own layers, once."""
    first, own = TICKET["stages"]
    halves = first | {"end": 2, "peer_id": EVE.peer_id}, first | {"start": 2}
    whole, cut = ticket(), ticket(stages=(*halves, own))
    for old, new in ((whole, cut), (cut, whole)):
        assert amend(new.model_copy(update={"epoch": 1}), old) == ""
    mine = halves[0] | {"peer_id": BOB.peer_id}
    assert amend(ticket(epoch=1, stages=(mine, halves[1], own)), whole) == "not_my_stage"
    less = {"peer_id": EVE.peer_id, "start": 6, "end": 7}, own | {"start": 7}
    assert amend(ticket(epoch=1, stages=(first, *less)), whole) == "not_my_stage"


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("stale_epoch", {"epoch": 4}),
        ("stale_epoch", {"epoch": 3}),
        ("not_my_stage", {"stages": (TICKET["stages"][0], TICKET["stages"][1] | {"peer_id": EVE.peer_id})}),
        ("not_my_stage", {"stages": (TICKET["stages"][0] | {"peer_id": BOB.peer_id}, TICKET["stages"][1])}),
        ("not_my_stage", {"stages": (TICKET["stages"][0], TICKET["stages"][1] | {"paid_from": 1})}),
        ("not_my_stage", {"stages": (TICKET["stages"][0] | {"end": 5}, TICKET["stages"][1] | {"start": 5})}),
        ("another_job", {"job_id": b"k" * 16}),
        ("another_job", {"manifest": "d" * 64}),
        ("another_job", {"dtype": "float32"}),
        ("another_job", {"prompt_tokens": 4}),
        ("another_job", {"max_tokens": 8}),
        ("another_job", {"stop_tokens": ()}),
        ("another_job", {"sampling": {"seed": 1}}),
        ("another_job", {"price": 1}),
        ("wrong_signer", {"coordinator": EVE.peer_id}),
        ("expired", {"expires_at": int(NOW) - 1}),
        ("from_the_future", {"issued_at": int(NOW) + CLOCK_SKEW_S + 2}),
    ],
)
def test_what_an_amendment_may_not_change(code: str, changes: dict[str, Any]) -> None:
    assert amend(ticket(**({"epoch": 5} | changes)), ticket(epoch=4)) == code


def test_an_amendment_that_somebody_else_signed() -> None:
    assert amend(ticket(epoch=1), ticket(), EVE) == "wrong_signer"


def test_an_amendment_by_a_coordinator_that_follows() -> None:
    """The one before has to have named it, and the worker to trust it."""
    old, hers = ticket(successors=(EVE.peer_id,)), {"epoch": 1, "coordinator": EVE.peer_id}
    assert amend(ticket(**hers, successors=(ALICE.peer_id,)), old, EVE) == ""
    assert amend(ticket(**hers), old, EVE, is_trusted=False) == "untrusted_coordinator"
    assert amend(ticket(**hers), ticket(), EVE) == "wrong_signer"
    assert amend(ticket(**hers, successors=(EVE.peer_id,)), ticket(), EVE) == "wrong_signer", "it names itself"
    assert amend(ticket(epoch=1), old, EVE) == "wrong_signer", "it poses as the one before"
    assert amend(ticket(**hers), old) == "wrong_signer"
    assert amend(ticket(**hers | {"price": 1}), old, EVE) == "another_job"
    assert amend(ticket(**hers | {"epoch": 0}), old, EVE) == "stale_epoch"
    followed = ticket(**hers)
    assert amend(ticket(epoch=2), followed) == "wrong_signer", "who was followed leads no more"
