"""A worker asks each coordinator that it has served what it is owed, and keeps the signed answer in its book."""

from __future__ import annotations

import logging
import time

import trio

from azu.channel import Channel
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.logs import log
from azu.overlay import Overlay
from azu.statements import check_statement, open_statement
from azu.wire.messages import ACCOUNT, ACCOUNT_PROTOCOL, GetStatus, Status
from node.book import Book

__all__ = ["ask", "keep_asking"]

logger = logging.getLogger(__name__)

# A coordinator is asked so long after a job that it was served, or so long after it was asked before.
_AFTER_JOB_S = 30.0
_AGAIN_S = 600.0
_ANSWER_S = 10.0


async def keep_asking(overlay: Overlay, peer_id: str, book: Book) -> None:
    """Ask until cancelled. peer_id: our own."""
    asked: dict[str, tuple[int, float]] = {}  # how many jobs it had been served, and when
    while True:
        await trio.sleep(_AFTER_JOB_S)
        try:
            served = await trio.to_thread.run_sync(book.earned)
        except AzuError as error:
            log(logger, logging.WARNING, "earnings not read", reason=str(error))
            continue
        for each in served:
            jobs, at = asked.get(each.coordinator, (0, -_AGAIN_S))
            if each.jobs == jobs and trio.current_time() < at + _AGAIN_S:
                continue
            asked[each.coordinator] = each.jobs, trio.current_time()
            try:
                await ask(overlay, each.coordinator, peer_id, book)
            except AzuError as error:
                log(logger, logging.DEBUG, "coordinator does not say what it owes", peer=each.coordinator,
                    reason=error.message)  # fmt: skip


async def ask(overlay: Overlay, coordinator: str, peer_id: str, book: Book) -> None:
    """Ask one coordinator.

    Raises:
        NetworkError: it does not answer. TrustError, ProtocolError: it answers something else.
        InternalError: the answer cannot be written down.
    """
    with trio.move_on_after(_ANSWER_S) as patience:
        async with await overlay.open_stream(coordinator, ACCOUNT_PROTOCOL) as stream:
            channel = Channel(stream, ACCOUNT)
            await channel.send(GetStatus())
            envelope = bytes((await channel.expect(Status))[1])
    if patience.cancelled_caught:
        raise NetworkError(f"{coordinator} did not answer for {_ANSWER_S:g} s", code="peer_silent")
    try:
        signer, statement = open_statement(envelope)
        refusal = check_statement(statement, signer=signer, coordinator=coordinator, worker=peer_id, now=time.time())
        if refusal is not None:
            raise TrustError(refusal.message, code=refusal.code, remedy=refusal.remedy)
    except (ProtocolError, TrustError):
        overlay.count_violation(coordinator)
        raise
    await book.keep_statement(coordinator, envelope, statement.issued_at)
