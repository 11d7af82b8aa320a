"""What each job cost and who earned it, written down for good.

A job's tokens are counted by the coordinator alone: it saw them come. With `p` prompt and `c` completion tokens,
`p + c - 1` positions went through every layer, since the last token is sampled and never run; nothing is charged where
no token came out. A stage is paid for that count, and for what it did only if others agree: `coordinator/agreement.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from azu.economics import split, token_layers
from azu.errors import InternalError
from azu.ledger import Earning, EndedJob, Ledger
from azu.tickets import JobTicket, Receipt, Refusal
from coordinator.agreement import Finding, compare
from coordinator.generation import JobReport, StageReport, known_as

__all__ = ["Meter", "read_job"]

Receipts = Mapping[int, tuple[bytes, Receipt]]


def read_job(ticket: JobTicket, prompt: Sequence[int], tokens: Sequence[int], receipts: Receipts) -> JobReport:
    """The meter's reading of a job of which these tokens reached the coordinator. Pure."""
    positions = ticket.positions(len(tokens))
    found = compare(ticket, prompt, tokens, {index: receipt for index, (_, receipt) in receipts.items()})
    stages = tuple(_read_stage(ticket, index, positions, finding) for index, finding in enumerate(found))
    total = token_layers(positions, ticket.n_layers)
    return JobReport(
        job_id=known_as(ticket.job_id),
        prompt_tokens=ticket.prompt_tokens,
        completion_tokens=len(tokens),
        token_layers=total,
        cost=total * ticket.price,
        stages=stages,
    )


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
        wallet, key_id: who asked for such a job.
    """

    def __init__(self, ledger: Ledger, *, is_free: bool = True, wallet: str = "", key_id: str | None = None) -> None:
        self._ledger = ledger
        self._is_free = is_free
        self._asker = (wallet, key_id)

    def asked_by(self, wallet: str, key_id: str | None) -> Meter:
        """The same, for the jobs of one who asks."""
        return Meter(self._ledger, is_free=self._is_free, wallet=wallet, key_id=key_id)

    async def settle(
        self, ticket: JobTicket, prompt: Sequence[int], tokens: Sequence[int], receipts: Receipts
    ) -> JobReport:
        """Read the meter for an ended job and write it down; a job that is already written down stays as it is.

        Raises:
            InternalError: the ledger cannot be written, or nothing is reserved for the job.
        """
        report = read_job(ticket, prompt, tokens, receipts)
        job = _ended(ticket, report, {index: envelope for index, (envelope, _) in receipts.items()})
        wallet, key_id = self._asker
        closed = await self._ledger.settle(replace(job, wallet=wallet, key_id=key_id), is_free=self._is_free)
        if isinstance(closed, Refusal):
            raise InternalError(f"job {report.job_id} cannot be settled: {closed.message}", code=closed.code)
        return report

    async def earnings(self) -> dict[str, int]:
        """What workers are owed, by peer id."""
        return await self._ledger.balances("worker")


def _ended(ticket: JobTicket, report: JobReport, envelopes: Mapping[int, bytes]) -> EndedJob:
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
                envelopes.get(index),
                " ".join((s.reason, *s.against)),
            )
            for index, s in enumerate(report.stages)
        ),
    )
