"""The KV cache of what is loaded, as running jobs take it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf

import trio

from azu.models.memory import first_positions
from azu.tickets import JobTicket
from node.engine.blocks import BLOCK, KvBlocks

__all__ = ["KvRoom"]

# A job that waits for room says so as often; its coordinator would think that it hangs.
_TELL_S = 10.0


class KvRoom:
    """`KvBlocks` with jobs that wait. A job may begin with its prompt and the first token."""

    def __init__(self, tokens: int = 0, block: int = BLOCK) -> None:
        self._blocks: KvBlocks[bytes] = KvBlocks(tokens, block)
        self._freed = trio.Event()

    @property
    def tokens(self) -> int:
        """Positions that there are."""
        return self._blocks.tokens

    @property
    def free(self) -> int:
        """Positions that no job has."""
        return self._blocks.free

    @property
    def room(self) -> int:
        """Positions that a new job may begin with."""
        return self._blocks.room

    def can_enter(self, ticket: JobTicket) -> bool:
        """Whether there is room for a job to begin."""
        return self._blocks.can_enter(_age(ticket), first_positions(ticket.prompt_tokens), ticket.total_tokens)

    def enter(self, ticket: JobTicket) -> None:
        """Let a job begin for which there is room."""
        self._blocks.enter(ticket.job_id, _age(ticket), first_positions(ticket.prompt_tokens), ticket.total_tokens)

    def leave(self, ticket: JobTicket) -> None:
        """Take back what a job has."""
        self._blocks.leave(ticket.job_id)
        self._freed.set()
        self._freed = trio.Event()

    def grow_at_once(self, job_id: bytes, tokens: int) -> bool:
        """Have a job hold `tokens` positions; False where it has to wait for that."""
        return self._blocks.grow(job_id, tokens)

    async def grow(self, job_id: bytes, tokens: int, tell: Callable[[], Awaitable[None]]) -> None:
        """Have a job hold `tokens` positions. While it has to wait for that, `tell` is called. Safe to cancel."""
        next_told = -inf
        while not self._blocks.grow(job_id, tokens):
            freed = self._freed
            if trio.current_time() >= next_told:
                await tell()
                next_told = trio.current_time() + _TELL_S
            with trio.move_on_at(next_told):
                await freed.wait()


def _age(ticket: JobTicket) -> tuple[int, bytes]:
    return ticket.begun_at, ticket.job_id
