"""Whether a stage of a running job goes on by another ticket. Pure, as `azu.tickets`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from azu.tickets import JobTicket, Refusal, StageEntry, check_times, check_trust

__all__ = ["check_amendment", "check_bequest"]


def check_amendment(
    ticket: JobTicket, old: JobTicket, *, signer: str, me: str, now: float, is_trusted: Callable[[str], bool]
) -> Refusal | None:
    """Whether the worker `me`, which runs a stage of the job by the ticket `old`, goes on by `ticket`; None means yes.

    The epoch, the times and all other stages may differ: peers, layers, what these are paid for, how many there are. So
    may the coordinator, if the one before named it, and this worker's owner trusts it too.
    """
    if (refusal := _check_order(ticket, old, signer)) is not None:
        return refusal
    if signer != old.coordinator and (refusal := check_trust(signer, is_trusted)) is not None:
        return refusal
    before = [stage for stage in old.stages if stage.peer_id == me]
    own = [stage for stage in ticket.stages if stage.peer_id == me]
    if not own or _ranges(own) != _ranges(before):
        return Refusal("not_my_stage", f"the amendment does not leave {me} its stage")
    if own[0].paid_from > before[0].paid_from:
        return Refusal("not_my_stage", f"the amendment takes from {me} what it is paid for")
    return _check_same(ticket, old) or check_times(ticket.issued_at, ticket.expires_at, now)


def check_bequest(ticket: JobTicket, old: JobTicket, *, signer: str, me: str, now: float) -> Refusal | None:
    """Whether the worker `me`, which runs a stage of the job by the ticket `old`, hands that stage's KV cache to the
    peer that has it in `ticket`; None means yes.
    """
    if (refusal := _check_order(ticket, old, signer)) is not None:
        return refusal
    if signer != old.coordinator:
        return Refusal("wrong_signer", "the order was not signed by the job's coordinator")
    before = [stage for stage in old.stages if stage.peer_id == me]
    heirs = [stage for stage in ticket.stages if stage.heir_of == me]
    if not heirs or _ranges(heirs) != _ranges(before):
        return Refusal("not_my_stage", f"the ticket leaves no stage of {me} to anybody")
    return _check_same(ticket, old) or check_times(ticket.issued_at, ticket.expires_at, now)


def _ranges(stages: Iterable[StageEntry]) -> list[tuple[int, int]]:
    return [(stage.start, stage.end) for stage in stages]


def _check_order(ticket: JobTicket, old: JobTicket, signer: str) -> Refusal | None:
    if signer != ticket.coordinator or not old.may_be_led_by(signer):
        return Refusal("wrong_signer", "the amendment was not signed by the job's coordinator, or one that it named")
    if ticket.epoch <= old.epoch:
        return Refusal("stale_epoch", f"epoch {ticket.epoch} came, {old.epoch} is in force")
    return None


def _check_same(ticket: JobTicket, old: JobTicket) -> Refusal | None:
    changing = {"epoch", "stages", "issued_at", "expires_at", "coordinator", "successors"}
    fields = JobTicket.model_fields.keys() - changing
    if any(getattr(ticket, name) != getattr(old, name) for name in fields):
        return Refusal("another_job", "the amendment changes more than stages and coordinators")
    return None
