"""What each job cost and who earned it, written down for good.

A job's tokens are counted by the coordinator alone: it saw them come. With `p` prompt and `c` completion tokens,
`p + c - 1` positions went through every layer, since the last token is sampled and never run; nothing is charged where
no token came out. A stage is paid for that count, and for what it did only if others agree: `coordinator/agreement.py`.
Who leaves a stage properly in the middle is paid up to there, and who has it then from there on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from azu.economics import split, token_layers
from azu.errors import InternalError
from azu.ledger import Earning, EndedJob, Ledger
from azu.logs import log
from azu.tickets import JobTicket, Receipt, Refusal
from coordinator.agreement import Finding, Handover, Word, compare, word_of
from coordinator.generation import JobReport, StageReport, known_as
from coordinator.unsettled import Unsettled, is_away

__all__ = ["Meter", "read_job"]

logger = logging.getLogger(__name__)

Receipts = Mapping[int, tuple[bytes, Receipt]]


def read_job(
    ticket: JobTicket,
    prompt: Sequence[int],
    tokens: Sequence[int],
    receipts: Receipts,
    handovers: Iterable[Handover] = (),
) -> JobReport:
    """The meter's reading of a job of which these tokens reached the coordinator. Pure.

    Args:
        receipts: by stage, of those who had them at the end.
        handovers: of stages, before.
    """
    stages = _read_stages(ticket, prompt, tokens, receipts, handovers)
    return _report(ticket, len(tokens), (stage for stage, _ in stages))


def _report(ticket: JobTicket, tokens: int, stages: Iterable[StageReport]) -> JobReport:
    total = token_layers(ticket.positions(tokens), ticket.n_layers)
    return JobReport(
        job_id=known_as(ticket.job_id),
        prompt_tokens=ticket.prompt_tokens,
        completion_tokens=tokens,
        token_layers=total,
        cost=total * ticket.price,
        stages=tuple(stages),
    )


def _read_stages(
    ticket: JobTicket,
    prompt: Sequence[int],
    tokens: Sequence[int],
    receipts: Receipts,
    handovers: Iterable[Handover],
) -> Iterator[tuple[StageReport, bytes | None]]:
    """Each stage with its receipt's envelope: those of the last epoch in their order, then those that left before."""
    everybody = range(len(ticket.stages))
    yield from _read_epoch(ticket, prompt, tokens, everybody, receipts, {})
    for handover in handovers:
        came = tokens[: handover.tokens]
        left = _read_epoch(handover.ticket, prompt, came, handover.left, handover.receipts, handover.words)
        yield from ((stage, envelope) for stage, envelope in left if stage.tokens)


def _read_epoch(
    ticket: JobTicket,
    prompt: Sequence[int],
    tokens: Sequence[int],
    paid: Iterable[int],
    receipts: Receipts,
    words: Mapping[int, Word],
) -> Iterator[tuple[StageReport, bytes | None]]:
    """What stages that are paid for up to the end of an epoch have done, and what is found of them."""
    said = {**words, **{index: word_of(receipt) for index, (_, receipt) in receipts.items()}}
    found = compare(ticket, prompt, tokens, said)
    for index in paid:
        positions = max(0, ticket.positions(len(tokens)) - ticket.stages[index].paid_from)  # tokens may be lost
        envelope = receipts[index][0] if index in receipts else None
        yield _read_stage(ticket, index, positions, found[index] if positions else Finding()), envelope


def _read_stage(ticket: JobTicket, index: int, positions: int, finding: Finding) -> StageReport:
    stage = ticket.stages[index]
    work = token_layers(positions, stage.end - stage.start)
    return StageReport(
        peer_id=stage.peer_id,
        start=stage.start,
        end=stage.end,
        tokens=positions,
        token_layers=work,
        earned=split(work * ticket.price).worker,
        state="held" if finding.reason else "credited",
        reason=finding.reason or "",
        against=finding.against,
    )


class Meter:
    """Settles ended jobs in the ledger.

    Args:
        is_free: a job that nothing is reserved for is paid out of the ledger's account `free`.
        unsettled: where jobs are kept that the ledger cannot take now; without it settling them fails.
        wallet, key_id: who asked for a job that nothing is reserved for.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        is_free: bool = True,
        unsettled: Unsettled | None = None,
        wallet: str = "",
        key_id: str | None = None,
    ) -> None:
        self.ledger = ledger
        self.unsettled = unsettled
        self._is_free = is_free
        self._asker = (wallet, key_id)

    def asked_by(self, wallet: str, key_id: str | None) -> Meter:
        """The same, for the jobs of one who asks."""
        return Meter(self.ledger, is_free=self._is_free, unsettled=self.unsettled, wallet=wallet, key_id=key_id)

    async def settle(
        self,
        ticket: JobTicket,
        prompt: Sequence[int],
        tokens: Sequence[int],
        receipts: Receipts,
        handovers: Iterable[Handover] = (),
    ) -> JobReport:
        """Read the meter for an ended job and write it down; a job that is already written down stays as it is.

        Raises:
            InternalError: it can be written down nowhere, or nothing is reserved for the job.
        """
        stages = list(_read_stages(ticket, prompt, tokens, receipts, handovers))
        report = _report(ticket, len(tokens), (stage for stage, _ in stages))
        wallet, key_id = self._asker
        ended = _ended(ticket, report, [envelope for _, envelope in stages])
        job = replace(ended, wallet=wallet, key_id=key_id)
        try:
            await self.settle_ended(job)
        except InternalError as error:
            if self.unsettled is None or not is_away(error):
                raise
            await self.unsettled.keep(job)
            log(logger, logging.ERROR, "job is settled later", job=job.job_id, reason=str(error))
        return report

    async def settle_ended(self, job: EndedJob) -> None:
        """Write a job down; one that is already written down stays as it is.

        Raises:
            InternalError: the ledger cannot be written, or nothing is reserved for the job.
        """
        closed = await self.ledger.settle(job, is_free=self._is_free)
        if isinstance(closed, Refusal):
            raise InternalError(f"job {job.job_id} cannot be settled: {closed.message}", code=closed.code)

    async def settle_kept(self) -> None:
        """Settle the jobs that the ledger could not take when they ended; raises InternalError where it cannot yet."""
        if self.unsettled is not None:
            await self.unsettled.settle(self.settle_ended)

    async def run(self) -> None:
        """Do that again and again until cancelled."""
        if self.unsettled is not None:
            await self.unsettled.run(self.settle_ended)

    async def earnings(self) -> dict[str, int]:
        """What workers are owed, by peer id."""
        return await self.ledger.balances("worker")


def _ended(ticket: JobTicket, report: JobReport, envelopes: Sequence[bytes | None]) -> EndedJob:
    return EndedJob(
        job_id=report.job_id,
        epoch=ticket.epoch,
        manifest=ticket.manifest,
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        token_layers=report.token_layers,
        cost=report.cost,
        earnings=tuple(
            Earning(
                s.peer_id,
                s.start,
                s.end,
                s.tokens,
                s.token_layers,
                s.earned,
                s.state,
                envelope,
                " ".join((s.reason, *s.against)),
            )
            for s, envelope in zip(report.stages, envelopes, strict=True)
        ),
    )
