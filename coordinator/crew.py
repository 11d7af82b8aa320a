"""The stages of one running job, each attended at the peer that the ticket in force names."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import trio

from azu.identity import Identity
from azu.overlay import Overlay
from azu.tickets import JobTicket, Receipt, sign_ticket
from coordinator.agreement import Handover
from coordinator.attendance import Attendance, Audience
from coordinator.generation import Note
from coordinator.mending import Start

__all__ = ["Crew"]


class Crew:
    """Attends the stages of a job, in tasks of the nursery that it is given.

    Args:
        audience: what stages say, and that one is lost, is for.
        keep_s: how long stages are to keep the job while this coordinator is away.

    Attributes:
        ticket: the one in force.
        stages: in their order; empty until they are attended.
        handovers: of stages that were left properly.
        note: called with each ticket before a stage gets to see it, and the handovers whenever more is known of them.
    """

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        ticket: JobTicket,
        prompt: Sequence[int],
        audience: Audience,
        *,
        keep_s: int = 0,
    ) -> None:
        self.ticket = ticket
        self.stages: list[Attendance] = []
        self.handovers: list[Handover] = []
        self._epoch = ticket.epoch  # the last one that a ticket was signed for
        self._noting = -1  # the epoch at whose beginning stages say what was before the last handover
        self._heirs: dict[int, Attendance] = {}  # of stages that are about to be left
        self._left: list[tuple[Handover, Attendance]] = []
        self.note: Note = _note_nothing
        self._keep_s = keep_s
        self._identity = identity
        self._overlay = overlay
        self._prompt = prompt
        self._audience = audience
        self._attending = 0
        self._is_over = False
        self._news = trio.Event()  # set when what somebody waits for may have come, and then replaced

    def attend(self, nursery: trio.Nursery) -> None:
        """Give all stages the ticket."""
        envelope = sign_ticket(self._identity, self.ticket)
        self.stages = [self._attend(nursery, index, envelope, self.ticket) for index in range(len(self.ticket.stages))]

    def bequeath(self, nursery: trio.Nursery, heirs: Mapping[int, str], positions: int) -> Mapping[int, Attendance]:
        """Have the workers of these stages send their KV caches to peers that are about to take them over.

        Args:
            positions: of all of them, so that no heir lacks what the one before it cannot send.
        """
        self._epoch += 1
        ticket = self.ticket.bequest(heirs, self._epoch, int(time.time()))
        envelope = sign_ticket(self._identity, ticket)
        self._heirs = {index: self._attend(nursery, index, envelope, ticket) for index in heirs}
        for index in heirs:
            self.stages[index].bequeath(envelope, positions)
        return self._heirs

    def disinherit(self) -> None:
        """Let the heirs go."""
        for stage in self._heirs.values():
            stage.leave()
        self._heirs = {}

    async def come_back(self, nursery: trio.Nursery) -> None:
        """Attend stages that have kept the job while this coordinator was away, and pause them."""
        self.stages = [
            self._attend(nursery, index, b"", self.ticket, is_kept=True) for index in range(len(self.ticket.stages))
        ]
        await self.amend(nursery, {}, 0)

    async def amend(
        self,
        nursery: trio.Nursery,
        peers: Mapping[int, str],
        known: int,
        left: tuple[int, ...] = (),
        cut: JobTicket | None = None,
    ) -> bool:
        """Give all stages the ticket of the next epoch, in which these peers have the stages of these indices, heirs
        among them; False where the job has ended meanwhile, or is led elsewhere now.

        Args:
            known: tokens that have come.
            left: the stages, by their index until now, whose workers leave properly, and are paid for what they did.
            cut: the ticket with other stages in the place of some, where these change, and what those are paid for.
        """
        if left:
            self.handovers.append(Handover(self.ticket, known, left))
            self._noting = self._epoch + 1
        paid_from = {} if cut else dict.fromkeys(left, self.ticket.positions(known))
        self._epoch += 1
        ticket = (cut or self.ticket).amended(peers, int(time.time()), paid_from, epoch=self._epoch)
        if not await self.note(ticket, self.handovers) or self._is_over:
            del self.handovers[-1 if left else len(self.handovers) :]
            return False
        for index in left:
            self._left.append((self.handovers[-1], self.stages[index]))
            self.stages[index].end(known)
        self.ticket = ticket
        envelope = sign_ticket(self._identity, ticket)
        before = {stage.peer_id: stage for stage in self.stages}
        self.stages = []
        for index, entry in enumerate(ticket.stages):
            stays = self._heirs.pop(index, None) if index in peers else before[entry.peer_id]
            if stays is not None:
                stays.amend(ticket, envelope, known)
            self.stages.append(stays or self._attend(nursery, index, envelope, ticket))
        return True

    def note_word(self, stage: Attendance) -> None:
        """Keep what a stage that is paused says of the epoch in which others left, if any did."""
        if self.handovers and self.ticket.epoch == self._noting and stage.word is not None:
            index = self.handovers[-1].ticket.stage_of(stage.peer_id)  # which may be another one now
            if index is not None:
                self.handovers[-1].words[index] = stage.word

    async def resume(self, starts: Sequence[Start], known: Sequence[int]) -> None:
        """Tell all stages, which are paused, where to go on."""
        if self.handovers:
            await self.note(self.ticket, self.handovers)
        for stage, start in zip(self.stages, starts, strict=True):
            stage.resume(start, known)

    async def end(self, tokens: int, patience: float) -> dict[int, tuple[bytes, Receipt]]:
        """End the job, of which so many tokens came, in every stage; the receipts that come within so many seconds."""
        self.disinherit()
        self._is_over = True
        for stage in self.stages:
            stage.end(tokens)
        with trio.move_on_after(patience):
            while self._attending:
                await self.news()
        return {stage.index: stage.receipt for stage in self.stages if stage.receipt is not None}

    def leave(self) -> None:
        """Attend no stage any more."""
        self.disinherit()
        for stage in (*self.stages, *(left for _, left in self._left)):
            stage.leave()

    def let_go(self) -> None:
        """Attend no stage any more; they keep the job for a while."""
        self.disinherit()
        for stage in (*self.stages, *(left for _, left in self._left)):
            stage.let_go()

    def tell_news(self) -> None:
        """Wake whoever waits for news."""
        self._news.set()
        self._news = trio.Event()

    async def news(self) -> None:
        """Wait until something may have changed."""
        await self._news.wait()

    def _attend(
        self, nursery: trio.Nursery, index: int, envelope: bytes, ticket: JobTicket, *, is_kept: bool = False
    ) -> Attendance:
        is_penalised_last = index == len(self.ticket.stages) - 1 and self.ticket.sampling.repetition_penalty != 1.0
        prompt = self._prompt if index == 0 or is_penalised_last else None
        stage = Attendance(self._overlay, ticket, index, envelope, prompt, keep_s=self._keep_s, is_kept=is_kept)
        self._attending += 1
        nursery.start_soon(self._attended, stage)
        return stage

    async def _attended(self, stage: Attendance) -> None:
        try:
            await stage.run(self._audience)
            with trio.CancelScope(shield=True):
                await self._note_receipt(stage)
        finally:
            self._attending -= 1
            self.tell_news()

    async def _note_receipt(self, stage: Attendance) -> None:
        """Keep the receipt of a stage that was left."""
        for handover, left in self._left:
            if left is stage and stage.receipt is not None:
                handover.receipts[stage.index] = stage.receipt
                await self.note(self.ticket, self.handovers)


async def _note_nothing(_ticket: JobTicket, _handovers: Sequence[Handover]) -> bool:
    await trio.lowlevel.checkpoint()
    return True
