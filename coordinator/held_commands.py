"""`azu-coordinator ledger held` and `decide`: earnings in dispute, and what their operator makes of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from azu.errors import InputError
from azu.ledger import Database, HeldEarning, Ledger, Refusal, find_held, reading
from coordinator.disputes import COMMON, Pair, partners
from coordinator.held_settings import DecideSettings, HeldSettings
from coordinator.ledger_settings import ledger_place

__all__ = ["decide_held", "named", "show_held"]

# See `coordinator.agreement.HeldReason`.
_WHY = {
    "no_receipt": "it gave no receipt of its own for this job and epoch",
    "short": "its receipt confirms fewer tokens than came",
    "contradicted": "its receipt is contradicted by",
    "unwitnessed": "neither of its neighbours gave a receipt",
}


def show_held(settings: HeldSettings) -> None:
    """Print what is held, and who disagrees with many."""
    with closing(Database(ledger_place(settings))) as database:
        database.check()
        with database.reading() as connection:
            found = find_held(connection, is_undecided=not settings.decided)
            currency = reading.head(connection).currency
    if settings.as_json:
        click.echo(json.dumps({"currency": currency, "held": [_document(each) for each in found]}, indent=2))
        return
    for earning in found:
        click.echo("\n".join(_lines(earning, currency)))
    waiting = sum(each.earned for each in found if each.outcome is None)
    click.echo(f"{waiting} {currency} are held and wait for a decision")
    for peer_id, others in named(found):
        click.echo(f"{peer_id} disagrees with {others} others: it may be the one that lies")


async def decide_held(settings: DecideSettings) -> None:
    """Decide on everything that is held of a worker, or on one job, and print each.

    Raises:
        InputError: code "nothing_held".
    """
    place = ledger_place(settings)
    with closing(Database(place)) as database:
        database.check()
        with database.reading() as connection:
            currency = reading.head(connection).currency
    async with Ledger.open(place, currency=currency) as ledger:
        done = 0
        while found := await ledger.held(peer_id=settings.worker, job_id=settings.job, is_undecided=True):
            for earning in found:
                await _decide(ledger, earning, settings)
            done += len(found)
    if not done:
        raise InputError(
            f"nothing is held of {settings.worker}" + (f" for job {settings.job}" if settings.job else ""),
            code="nothing_held",
            remedy="`azu-coordinator ledger held` shows what is; a decision is final",
        )


async def _decide(ledger: Ledger, earning: HeldEarning, settings: DecideSettings) -> None:
    answer = await ledger.decide(earning.job_id, earning.epoch, earning.stage, settings.outcome)
    place = f"job {earning.job_id}, stage {earning.stage}"
    if isinstance(answer, Refusal):
        click.echo(f"{place}: {answer.message}")
    elif settings.as_json:
        click.echo(json.dumps({**_document(earning), "outcome": answer}))
    else:
        amount = earning.earned if answer == "worker" else earning.refund
        whom = earning.peer_id if answer == "worker" else earning.wallet or "free"
        click.echo(f"{place}: {amount} {ledger.currency} to {whom}")


def named(found: Sequence[HeldEarning]) -> list[tuple[str, int]]:
    """Peers that disagree with many others in what is held, and with how many; the most first. Pure."""
    counts = ((peer_id, len(others)) for peer_id, others in partners(_pairs(found)).items())
    return sorted((each for each in counts if each[1] >= COMMON), key=lambda each: -each[1])


def _pairs(found: Sequence[HeldEarning]) -> Iterator[Pair]:
    for earning in found:
        why, *against = earning.reason.split(" ")
        if why == "contradicted":
            yield from ((earning.peer_id, other) for other in against)


def _lines(earning: HeldEarning, currency: str) -> Iterator[str]:
    when = datetime.fromtimestamp(earning.settled_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    yield f"{when}  job {earning.job_id}, stage {earning.stage}: {earning.earned} {currency}"
    why, *against = earning.reason.split(" ")
    yield f"  worker   {earning.peer_id}, layers {earning.start}-{earning.end - 1}"
    yield f"  held     {_WHY.get(why, why or 'before there was a ledger')}"
    yield from (f"           {other}" for other in against)
    if earning.outcome is not None:
        yield f"  decided  for the {earning.outcome}"


def _document(earning: HeldEarning) -> dict[str, Any]:
    receipt = base64.b64encode(earning.receipt).decode() if earning.receipt else None
    return {**asdict(earning), "receipt": receipt}
