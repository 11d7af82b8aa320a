"""`azu-node earnings`: what a worker has earned by its own book, and the proof of a job."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from azu.errors import InputError
from azu.statements import AccountStatement, open_statement
from node.book import BOOK_FILE, Book, Earned, Served
from node.settings import EarningsSettings

__all__ = ["facts_of", "print_earnings", "proof_of", "show"]


def print_earnings(settings: EarningsSettings) -> None:
    """Raises InputError where there is nothing to print, InternalError where the book cannot be read."""
    if settings.proof is not None:
        click.echo(json.dumps(proof_of(settings.data_dir, settings.proof), indent=2))
        return
    book = _book(settings.data_dir)
    earned = book.earned()
    said = {coordinator: open_statement(each)[1] for coordinator, each in book.statements().items()}
    jobs = book.latest(settings.jobs)
    if settings.as_json:
        listed = {"jobs": [_facts(each) for each in jobs]} if jobs else {}
        click.echo(json.dumps({**facts_of(earned, said), **listed}, indent=2))
        return
    click.echo(show(earned, said))
    for each in jobs:
        ended = "" if each.is_settled else "  unsettled"
        click.echo(f"{_when(each.ended_at)}  job {each.job_id}: {each.token_layers:,} token-layers, "
                   f"{each.earned:,}{ended}")  # fmt: skip


def proof_of(data_dir: Path, job_id: str) -> dict[str, Any]:
    """What proves a job: the envelopes of its last ticket and of its receipt in base64, and what they say.

    Raises:
        InputError: code "unknown_job", where it is not in the book, or not any more.
    """
    found = _book(data_dir).find(job_id)
    if not found:
        raise InputError(
            f"the book in {data_dir} has no job {job_id}",
            code="unknown_job",
            remedy="`azu-node earnings --jobs 20` lists the last ones; old receipts are deleted, see --receipts-limit "
            "and --receipts-days of `azu-node join`",
        )
    last = found[-1]
    envelopes = {"ticket": last.ticket, "receipt": last.receipt}
    return {**_facts(last), **{name: base64.b64encode(envelope).decode() for name, envelope in envelopes.items()}}


def _facts(served: Served) -> dict[str, Any]:
    return {
        "job_id": served.job_id,
        "epoch": served.epoch,
        "coordinator": served.coordinator,
        "ended_at": served.ended_at,
        "settled": served.is_settled,
        "tokens": served.positions,
        "token_layers": served.token_layers,
        "earned": served.earned,
    }


def facts_of(earned: Sequence[Earned], said: Mapping[str, AccountStatement]) -> dict[str, Any]:
    """The document that --json prints. Pure.

    Args:
        said: by coordinator, what it last signed that it owes this worker.
    """
    return {
        "total": _sums(earned),
        "coordinators": [
            {
                "coordinator": each.coordinator,
                **_sums([each]),
                "says": _said(said[each.coordinator]) if each.coordinator in said else None,
            }
            for each in earned
        ],
    }


def show(earned: Sequence[Earned], said: Mapping[str, AccountStatement]) -> str:
    """The page; see `facts_of`. Pure."""
    if not earned:
        return "nothing yet: no job has ended here"
    rows = [(each.coordinator, _sums([each])) for each in earned]
    if len(rows) > 1:
        rows.append(("all", _sums(earned)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'coordinator':<{width}}{'jobs':>10}{'unsettled':>11}{'token-layers':>16}{'earned':>24}  last job"]
    for name, sums in rows:
        lines.append(
            f"{name:<{width}}{sums['jobs']:>10,}{sums['unsettled']:>11,}{sums['token_layers']:>16,}"
            f"{sums['earned']:>24,}  {_when(sums['last'])}"
        )
        if name in said:
            says = _said(said[name])
            amounts = ", ".join(f"{says[each]:,} {each}" for each in ("owed", "held", "paying", "paid"))
            lines.append(f"  says at {_when(said[name].issued_at)}: {amounts} ({said[name].currency})")
    return "\n".join(lines)


def _said(statement: AccountStatement) -> dict[str, Any]:
    amounts = {name: int(getattr(statement, name)) for name in ("owed", "held", "paying", "paid")}
    return {"currency": statement.currency, **amounts, "issued_at": statement.issued_at}


def _when(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _sums(earned: Sequence[Earned]) -> dict[str, int]:
    return {
        "jobs": sum(each.jobs for each in earned),
        "unsettled": sum(each.unsettled for each in earned),
        "token_layers": sum(each.token_layers for each in earned),
        "earned": sum(each.earned for each in earned),
        "since": min((each.since for each in earned), default=0),
        "last": max((each.last for each in earned), default=0),
    }


def _book(data_dir: Path) -> Book:
    if not (data_dir / BOOK_FILE).exists():
        raise InputError(
            f"the data folder {data_dir} has no book of earnings",
            code="no_book",
            remedy="Name the worker's folder with --data-dir; `azu-node join` makes the book when it first starts",
        )
    return Book(data_dir)
