"""Pages of the ledger out of the database, and back into it: a few statements for a whole group of operations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from outcome import Outcome, capture
from sqlalchemy import Connection, RowMapping, Table, bindparam, insert, select, tuple_, update

from azu.ledger import schema
from azu.ledger.accounts import kind_of
from azu.ledger.answers import Closed, Deposited, KeyLimit, Payout, Reserved
from azu.ledger.page import Cells, Operation, Page, Row, row_of

__all__ = ["KeyLimits", "commit_group", "payout_of", "reservation_of"]

K = TypeVar("K")

# PostgreSQL takes 65,535 parameters in a statement, SQLite 32,766; a pair is two.
_MOST_PARAMETERS = 10_000
# The limits of API keys, read in the transaction that spends; a key that is missing has none.
KeyLimits = Callable[[Connection, Collection[str]], Mapping[str, KeyLimit]]


def commit_group(
    connection: Connection, operations: Sequence[Operation[Any]], now: int, key_limits: KeyLimits | None = None
) -> list[Outcome[Any]]:
    """Decide operations one after the other, and write what they change; the caller commits it.

    An outcome is an operation's answer, or the error that only it raised.
    """
    page = _fill(connection, operations, now, key_limits)
    outcomes = [capture(operation.decide, page) for operation in operations]
    _write(connection, page)
    return outcomes


def _fill(connection: Connection, operations: Sequence[Operation[Any]], now: int, key_limits: KeyLimits | None) -> Page:
    """What the operations need. Whoever else wants to change the ledger waits from here on, until the commit."""
    head = connection.execute(select(schema.head).with_for_update()).one()
    wanted = [operation.wanted() for operation in operations]
    job_ids = {job_id for each in wanted for job_id in each.jobs}
    payout_ids = {payout_id for each in wanted for payout_id in each.payouts}
    page = Page(
        now=now,
        seq=head.seq,
        digest=head.digest,
        reservations=Cells(_reservations(connection, job_ids)),
        settled=_settled(connection, job_ids),
        deposits=Cells(_deposits(connection, {place for each in wanted for place in each.deposits})),
        payouts=Cells(_payouts(connection, payout_ids)),
        signings=_signings(connection, payout_ids),
        known=_known(connection, {key for each in wanted for key in each.transactions}),
        leaders=_leaders(connection, {job_id for each in wanted for job_id in each.led}),
    )
    touched = [operation.touched(page) for operation in operations]
    key_ids = {key_id for each in touched for key_id in each.key_ids}
    page.balances = Cells(_balances(connection, {account for each in touched for account in each.accounts}))
    page.spending = Cells(_spending(connection, key_ids))
    page.limits = key_limits(connection, key_ids) if key_limits is not None and key_ids else {}
    return page


def _write(connection: Connection, page: Page) -> None:
    """Insert and update what is new and changed on the page."""
    _write_cells(connection, schema.balances, "account", page.balances, _balance_row)
    _write_cells(
        connection, schema.key_spending, "key_id", page.spending, lambda key, spent: {"key_id": key, "spent": spent}
    )
    _write_cells(connection, schema.reservations, "job_id", page.reservations, lambda _, value: row_of(value))
    _write_cells(connection, schema.payouts, "payout_id", page.payouts, lambda _, value: row_of(value))
    for table in schema.METADATA.sorted_tables:  # those that others refer to come first
        if rows := page.new.get(table.name):
            connection.execute(insert(table), rows)
    connection.execute(update(schema.head).values(seq=page.seq, digest=page.digest))


def reservation_of(row: RowMapping) -> Reserved:
    """A row of the reservations."""
    return Reserved(**row)


def payout_of(row: RowMapping) -> Payout:
    """A row of the payouts."""
    return Payout(**row)


def _balance_row(account: str, balance: int) -> Row:
    return {"account": account, "kind": kind_of(account), "balance": balance}


def _write_cells(
    connection: Connection,
    table: Table,
    key: str,
    cells: Cells[str, Any],
    to_row: Callable[[str, Any], Row],
) -> None:
    if added := [to_row(*each) for each in cells.added()]:
        connection.execute(insert(table), added)
    if changed := [{**to_row(*each), "where": each[0]} for each in cells.changed()]:
        values: dict[str, Any] = {name: bindparam(name) for name in changed[0] if name not in (key, "where")}
        connection.execute(update(table).where(table.c[key] == bindparam("where")).values(values), changed)


def _rows(connection: Connection, table: Table, column: str, ids: Collection[str]) -> Iterator[RowMapping]:
    for some in _batches(ids):
        yield from connection.execute(select(table).where(table.c[column].in_(some))).mappings()


def _batches(ids: Collection[K]) -> Iterator[list[K]]:
    left = iter(ids)
    while some := list(islice(left, _MOST_PARAMETERS)):
        yield some


def _reservations(connection: Connection, job_ids: Collection[str]) -> dict[str, Reserved]:
    return {row["job_id"]: reservation_of(row) for row in _rows(connection, schema.reservations, "job_id", job_ids)}


def _settled(connection: Connection, job_ids: Collection[str]) -> dict[str, Closed]:
    rows = _rows(connection, schema.jobs, "job_id", job_ids)
    return {row["job_id"]: Closed(row["job_id"], row["cost"], 0) for row in rows}


def _deposits(connection: Connection, places: Collection[tuple[str, str]]) -> dict[tuple[str, str], Deposited]:
    table = schema.deposits
    found: dict[tuple[str, str], Deposited] = {}
    for some in _batches(places):
        for row in connection.execute(select(table).where(tuple_(table.c.chain, table.c.txid).in_(some))):
            found[row.chain, row.txid] = Deposited(row.chain, row.txid, row.wallet, row.amount, is_new=False)
    return found


def _payouts(connection: Connection, payout_ids: Collection[str]) -> dict[str, Payout]:
    return {row["payout_id"]: payout_of(row) for row in _rows(connection, schema.payouts, "payout_id", payout_ids)}


def _signings(connection: Connection, payout_ids: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    rows = _rows(connection, schema.payout_transactions, "payout_id", payout_ids)
    for row in sorted(rows, key=lambda row: int(row["number"])):
        found.setdefault(row["payout_id"], []).append(row["txid"])
    return found


def _known(connection: Connection, keys: Collection[str]) -> set[str]:
    return {row["key"] for row in _rows(connection, schema.transactions, "key", keys)}


def _leaders(connection: Connection, job_ids: Collection[str]) -> dict[str, str | None]:
    jobs, requests = schema.kept_jobs, schema.kept
    query = select(jobs.c.job_id, requests.c.leader).join(requests, requests.c.request_id == jobs.c.request_id)
    found: dict[str, str | None] = {}
    for some in _batches(job_ids):
        for row in connection.execute(query.where(jobs.c.job_id.in_(some))):
            found[row.job_id] = row.leader
    return found


def _balances(connection: Connection, accounts: Collection[str]) -> dict[str, int]:
    return {row["account"]: row["balance"] for row in _rows(connection, schema.balances, "account", accounts)}


def _spending(connection: Connection, key_ids: Collection[str]) -> dict[str, int]:
    return {row["key_id"]: row["spent"] for row in _rows(connection, schema.key_spending, "key_id", key_ids)}
