"""The way out of a leg: hidden states to the next stage, tokens to the first one and to the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from azu.crossings import SeamLog
from azu.errors import AzuError
from azu.wire.frames import Buffer
from azu.wire.messages import Chunk, Next, Token
from azu.wire.tensors import TensorHeader
from node.agenda import Agenda, Result
from node.history import History
from node.line import Line
from node.packs import Entry, PackLink
from node.ring import RingLink
from node.session import StageSession

__all__ = ["Outlet"]


class Outlet:
    """One leg's, on its way with `session`.

    Args:
        link: to the next stage; None in a ring of one stage, where `to_self` takes the tokens.

    Attributes:
        reports: the stream for tokens of all jobs to the coordinator, where this is a last stage.
        send_from: the next stage has what comes before this position.
        sent: the hidden states that were given to it.
    """

    def __init__(
        self,
        session: StageSession,
        link: RingLink | None,
        coordinator: Line,
        agenda: Agenda,
        to_self: Callable[[int, int], None],
    ) -> None:
        self.session = session
        self.reports: PackLink | None = None
        self.send_from = 0
        self.sent = SeamLog()
        self._link = link
        self._coordinator = coordinator
        self._agenda = agenda
        self._to_self = to_self

    async def replay(self, history: History) -> None:
        """Send on what the next stage lacks of what was computed before."""
        if self._link is not None and not self.session.is_last:
            for position, body in history.replay(self.send_from, self.session.rows):
                await self._send_rows(self._link, position, body)

    async def pass_on(self, result: Result | Token) -> None:
        """Send what a step gave; or of a token what is left to send, which the coordinator gets."""
        if isinstance(result, Token):
            with self._agenda.pausable():
                await self._coordinator.send(result)
        elif result.token is not None:
            await self._pass_token(result.token)  # to the first stage first, since the next step waits for it there
            self._report(result.token)
        elif self._link is not None:
            skipped = min(max(0, self.send_from - result.position), result.rows)
            if skipped < result.rows:
                body = result.body[skipped * self.session.row_bytes :]
                await self._send_rows(self._link, result.position + skipped, body)

    async def _send_rows(self, link: RingLink, position: int, body: Buffer) -> None:
        """To the next stage, and note it even where that fails: it may have left."""
        session = self.session
        rows = len(body) // session.row_bytes
        header = TensorHeader(dtype=session.dtype, shape=(rows, session.hidden_size))
        try:
            with self._sending(link):
                chunk = Chunk(position=position, tensor=header, sample=position + rows >= session.base)
                await link.send_chunk(chunk, body)
        finally:  # afterwards: the next stage waits for it
            self.sent.note(position, rows, body)

    async def _pass_token(self, token: Token) -> None:
        """To the first stage, if that is another: `pass_at_once` has seen to this one."""
        if self._link is not None and not token.finish:
            with self._sending(self._link):
                await self._link.send_next(Next(index=token.index, token=token.token))

    def _sending(self, link: RingLink) -> AbstractContextManager[None]:
        """As `pausable`, for what is sent on. What need not be waited for takes no scope."""
        return nullcontext() if link.is_ready and not self._agenda.is_paused else self._agenda.pausable()

    def pass_at_once(self, result: Result) -> bool:
        """Pass a decoded token on without waiting, where that can be; what is left of it is put on the agenda."""
        token, ticket = result.token, self.session.ticket
        if self._agenda.is_paused or (token is not None and token.finish):
            return False
        if self._link is None:
            if token is not None:
                self._to_self(token.index, token.token)
                self._report(token)
            return token is not None
        pack = self._link.pack
        begins = result.position if token is None else ticket.prompt_tokens + token.index
        if pack is None or not pack.is_open or not self.session.may_pack(begins):
            return False
        if token is not None:
            entry = Entry(ticket.job_id, ticket.epoch, token.index, token=token.token)
        else:
            entry = Entry(ticket.job_id, ticket.epoch, result.position, result.body, self.session.dtype)
        pack.add(entry, partial(self._has_left, result))
        return True

    def _has_left(self, result: Result, error: AzuError | None) -> None:
        if result.token is None:
            self.sent.note(result.position, result.rows, result.body)
        if error is not None:
            self._agenda.fail(error)
        elif result.token is not None:
            self._report(result.token)

    def _report(self, token: Token) -> None:
        """Let the coordinator have it: with those of other jobs, or else on the job's own stream."""
        if self.reports is None or not self.reports.is_open:
            self._agenda.pass_on(token)
            return
        ticket = self.session.ticket
        entry = Entry(ticket.job_id, ticket.epoch, token.index, token=token.token)
        self.reports.add(entry, lambda error: self._agenda.pass_on(token) if error is not None else None)
