"""Streamed answers that outlive the coordinator's process: noted while they run, and claimed by their clients after a
restart. What nobody claims is ended, and settled for the tokens that had been sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from azu.errors import AzuError
from azu.logs import log
from azu.tickets import JobTicket
from coordinator.agreement import Handover
from coordinator.api.errors import ApiError
from coordinator.generation import Generation
from coordinator.journal import Journal, Left, Unfinished

__all__ = ["CLAIM_S", "Kept", "Unclaimed", "no_such_stream"]

logger = logging.getLogger(__name__)

# After a restart, streams wait for their clients so long. Workers keep jobs for longer (`azu.wire.messages.KEEP_S`).
CLAIM_S = 60.0


class Kept:
    """One streamed answer in the journal.

    Args:
        unfinished: all of it but, in a new one, the ticket.

    Attributes:
        ticket, handovers: by which it is taken up; no ticket in a new one.
        is_let_go: whether it is left to its stages, as this process ends.
    """

    def __init__(self, journal: Journal, unfinished: Unfinished, ticket: JobTicket | None = None) -> None:
        self.ticket = ticket
        self.handovers = [each.handover() for each in unfinished.left]
        self.is_let_go = False
        self._journal = journal
        self._unfinished = unfinished

    @property
    def stream(self) -> str:
        """What its client names it by."""
        return self._unfinished.stream

    def note(self, ticket: JobTicket, handovers: Sequence[Handover]) -> None:
        """Note by what it can be taken up."""
        changes = {"ticket": ticket.to_cbor(), "left": tuple(map(Left.of, handovers))}
        self._journal.write(self._unfinished.model_copy(update=changes))

    def let_go(self, generation: Generation) -> None:
        """Leave it to its stages."""
        self.is_let_go = True
        generation.let_go()

    def close(self) -> None:
        """It has ended here: forget it, unless it was let go."""
        if not self.is_let_go:
            self._journal.forget(self.stream)


class Unclaimed:
    """Streams of before the restart, until their clients come or time is up.

    Args:
        end: ends one, and settles it.
    """

    def __init__(self, found: Iterable[Unfinished], end: Callable[[Unfinished], Awaitable[None]]) -> None:
        self._waiting = {each.stream: each for each in found}
        self._end = end

    def claim(self, stream: str, wallet: str) -> Unfinished:
        """Hand a stream to its client, once.

        Raises:
            ApiError: status 404 where none of its wallet waits.
        """
        found = self._waiting.get(stream)
        if found is None or found.wallet != wallet:
            raise no_such_stream()
        return self._waiting.pop(stream)

    async def run(self) -> None:
        """End what is not claimed in time, then return."""
        await trio.sleep(CLAIM_S)
        left, self._waiting = self._waiting, {}
        async with trio.open_nursery() as nursery:
            for unfinished in left.values():
                nursery.start_soon(self._give_up, unfinished)

    async def _give_up(self, unfinished: Unfinished) -> None:
        log(logger, logging.INFO, "stream was not claimed", job=unfinished.job_id)
        try:
            await self._end(unfinished)
        except AzuError as error:  # a border: there is nobody to be told
            log(logger, logging.WARNING, "unclaimed job not ended", job=unfinished.job_id, reason=error.message)


def no_such_stream() -> ApiError:
    """What a client gets that cannot go on."""
    return ApiError(
        "No such stream waits to be gone on with",
        status=404,
        code="stream_not_found",
        remedy=f"After a restart, streams wait for {CLAIM_S:.0f} s. Send the request again.",
    )
