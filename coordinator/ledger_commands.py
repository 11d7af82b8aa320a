"""`azu-coordinator ledger`: what it says, while coordinators write to it or not, and a copy of it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, time

import click

from azu.datadir import open_data_dir
from azu.errors import InternalError
from azu.ledger import Connection, Database, Entry, Line, copy_ledger, reading, verify
from coordinator.ledger_settings import CopySettings, LedgerSettings, StatementSettings, ledger_place

__all__ = ["copy_to", "export_ledger", "show_statement", "verify_ledger"]

_EXIT_WRONG = 1


def verify_ledger(settings: LedgerSettings) -> None:
    """Print what does not add up, and end with 1 if anything does not."""
    with _opened(settings) as (name, connection):
        findings = verify(connection)
        head = reading.head(connection)
    facts = {"ledger": name, **asdict(head)}
    if settings.as_json:
        click.echo(json.dumps({**facts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.where}: {finding.what}")
        verdict = f"findings: {len(findings)}" if findings else "all adds up"
        click.echo(f"{name}: {head.seq} transactions in {head.currency}, {verdict}")
        click.echo(f"digest of the last: {head.digest}")
    if findings:
        click.get_current_context().exit(_EXIT_WRONG)


def export_ledger(settings: LedgerSettings) -> None:
    """Print every transaction: CSV with a line for each posting, or a JSON object a line."""
    with _opened(settings) as (_, connection):
        if settings.as_json:
            for entry in reading.entries(connection):
                click.echo(json.dumps(_document(entry)))
            return
        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(["seq", "time", "kind", "key", "account", "amount"])
        for entry in reading.entries(connection):
            for account, amount in entry.postings:
                lines.writerow([entry.seq, _when(entry.at), entry.kind, entry.key, account, amount])


def show_statement(settings: StatementSettings) -> None:
    """Print what moved on one account."""
    first = datetime.combine(settings.since, time(), UTC).timestamp() if settings.since else 0
    with _opened(settings) as (_, connection):
        lines = reading.statement(connection, settings.account, int(first))
        balance, currency = reading.balance(connection, settings.account), reading.head(connection).currency
    if settings.as_json:
        facts = {"account": settings.account, "currency": currency, "balance": balance}
        click.echo(json.dumps({**facts, "lines": [asdict(line) for line in lines]}, indent=2))
        return
    if lines:
        _print_lines(lines)
    click.echo(f"{settings.account} has {balance} {currency}")


def _print_lines(lines: Sequence[Line]) -> None:
    """As a table that is as wide as it has to be: of amounts and ids no digit may be missing."""
    rows = [("TIME", "KIND", "AMOUNT", "BALANCE", "KEY")]
    rows += [(_when(each.at), each.kind, f"{each.amount:+}", str(each.balance), each.key) for each in lines]
    when, kind, amount, balance, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        click.echo(f"{row[0]:<{when}}  {row[1]:<{kind}}  {row[2]:>{amount}}  {row[3]:>{balance}}  {row[4]}")


def copy_to(settings: CopySettings) -> None:
    """Copy the ledger, and check the copy."""
    with (
        open_data_dir(settings.data_dir),
        _opened(settings) as (_, source),
        closing(Database(settings.target)) as target,
    ):
        copy_ledger(source, target)
        with target.reading() as copied:
            findings, head = verify(copied), reading.head(copied)
    if findings:
        raise InternalError(f"the copy in {target.name} does not add up: {findings[0].where}: {findings[0].what}")
    if settings.as_json:
        click.echo(json.dumps({"ledger": target.name, **asdict(head)}))
    else:
        click.echo(f"{target.name}: {head.seq} transactions in {head.currency}, all adds up")
        click.echo(f"digest of the last: {head.digest}")


@contextmanager
def _opened(settings: LedgerSettings) -> Iterator[tuple[str, Connection]]:
    with closing(Database(ledger_place(settings))) as database:
        database.check()
        with database.reading() as connection:
            yield database.name, connection


def _document(entry: Entry) -> dict[str, object]:
    postings = [{"account": account, "amount": amount} for account, amount in entry.postings]
    return {**asdict(entry), "postings": postings}


def _when(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
