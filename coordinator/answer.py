"""The answer of one job, as its tokens come and its client reads them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Literal

import trio

from azu.errors import AzuError
from azu.tickets import JobTicket
from coordinator.generation import SampledToken

__all__ = ["Answer"]


class Answer:
    """The tokens of one job.

    Args:
        ticket: any of the job's.

    Attributes:
        tokens: those that have come.
        is_complete: whether the last one has.
        is_ended: whether no more of them are wanted.
        loss: why no more come, where something went wrong.
        began_at, told_at: when the client was told the first one and the last one, in trio's time.
    """

    def __init__(self, ticket: JobTicket) -> None:
        self.tokens: list[int] = []
        self.is_complete = False
        self.is_ended = False
        self.loss: AzuError | None = None
        self.began_at = self.told_at = trio.current_time()
        self._stop_tokens = ticket.stop_tokens
        self._most = ticket.max_tokens
        self._begun = trio.Event()
        # Bounded by the ticket: at most max_tokens tokens and one error are ever put in.
        self._events_in, self._events = trio.open_memory_channel[SampledToken | AzuError](ticket.max_tokens + 1)

    @property
    def is_over(self) -> bool:
        """Whether nothing that goes wrong from now on matters to the client."""
        return self.is_ended or self.is_complete or self.loss is not None

    def finish(self, token: int) -> Literal["", "stop", "length"]:
        """What ends with the next token, if this is it."""
        if token in self._stop_tokens:
            return "stop"
        return "length" if len(self.tokens) + 1 == self._most else ""

    def add(self, token: int) -> None:
        """Tell the client the next token."""
        sampled = SampledToken(token, self.finish(token))
        self.tokens.append(token)
        self.is_complete = bool(sampled.finish)
        self.told_at = trio.current_time()
        if len(self.tokens) == 1:
            self.began_at = self.told_at
        self._begun.set()
        self._events_in.send_nowait(sampled)

    @property
    def ends_within(self) -> float:
        """Seconds until the last token at the latest, if they go on to come as fast as until now."""
        came = len(self.tokens) - 1
        if came < 1:
            return math.inf
        return (self._most - len(self.tokens)) * (trio.current_time() - self.began_at) / came

    def give_up(self, loss: AzuError) -> None:
        """Tell the client that no more come."""
        self.loss = loss
        self._begun.set()
        self._events_in.send_nowait(loss)

    async def begins(self) -> bool:
        """Wait for the first token; False where none comes, see `loss`."""
        await self._begun.wait()
        return bool(self.tokens)

    async def read(self) -> AsyncIterator[SampledToken]:
        """The tokens up to the last, for one reader; raises the `loss`."""
        async for event in self._events:
            if isinstance(event, AzuError):
                raise event
            yield event
            if event.finish:
                return
