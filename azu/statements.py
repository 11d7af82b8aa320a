"""What a coordinator says in writing that it owes a worker. Amounts are decimal text: CBOR's integers have 64 bits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from azu.identity import Identity, Kind, open_envelope, seal
from azu.tickets import CLOCK_SKEW_S, Refusal, UnixTime
from azu.wire.document import Document, PeerId

__all__ = ["AccountStatement", "check_statement", "open_statement", "sign_statement"]

Amount = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,38})$")]


class AccountStatement(Document):
    """A worker's account with a coordinator, in the smallest unit of its currency.

    owed: earned and not paid yet. held: in dispute, not counted in owed. paying: on its way to the worker's address.
    paid: in all.
    """

    coordinator: PeerId
    worker: PeerId
    currency: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,32}$")]
    owed: Amount
    held: Amount
    paying: Amount
    paid: Amount
    issued_at: UnixTime


def sign_statement(identity: Identity, statement: AccountStatement) -> bytes:
    """The statement in its coordinator's envelope."""
    return seal(identity, Kind.ACCOUNT, statement.to_cbor())


def open_statement(data: bytes) -> tuple[str, AccountStatement]:
    """The signer's peer id and the statement.

    Raises:
        TrustError: the signature does not hold.
        ProtocolError: the content is not a statement.
    """
    signed = open_envelope(data, Kind.ACCOUNT)
    return signed.peer_id, AccountStatement.from_cbor(signed.payload)


def check_statement(
    statement: AccountStatement, *, signer: str, coordinator: str, worker: str, now: float
) -> Refusal | None:
    """Whether it is that coordinator's statement for that worker; None means yes."""
    if (signer, statement.coordinator) != (coordinator, coordinator):
        return Refusal("wrong_signer", "the statement was not signed by the coordinator that was asked")
    if statement.worker != worker:
        return Refusal("not_for_me", f"the statement is for {statement.worker}")
    if statement.issued_at > now + CLOCK_SKEW_S:
        return Refusal("from_the_future", "it was issued in the future", "Compare the clocks of both machines (NTP)")
    return None
