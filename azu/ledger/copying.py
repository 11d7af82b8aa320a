"""A ledger copied into another database, row by row: from SQLite to PostgreSQL, or back."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from azu.errors import InputError
from azu.ledger import reading, schema
from azu.ledger.database import Database

__all__ = ["copy_ledger"]

_CHUNK = 1000  # rows


def copy_ledger(source: Connection, target: Database) -> None:
    """Write all of a ledger into a database that has none, or an empty one, in one transaction.

    Raises:
        InputError: code "ledger_not_empty"; and as `Database.prepare`.
        InternalError: the target cannot be used.
    """
    target.prepare(reading.head(source).currency)
    target.write(lambda connection: _copy(source, connection))


def _copy(source: Connection, target: Connection) -> None:
    if target.execute(select(schema.head.c.seq).with_for_update()).scalar_one():
        raise InputError(
            "the target has transactions already",
            code="ledger_not_empty",
            remedy="Name a database without a ledger, or one that nothing was written to",
        )
    for table in schema.METADATA.sorted_tables:
        if table is schema.head:
            continue
        rows = source.execute(select(table), execution_options={"yield_per": _CHUNK}).mappings()
        for some in rows.partitions(_CHUNK):
            target.execute(insert(table), [dict(row) for row in some])
    head = source.execute(select(schema.head)).mappings().one()
    target.execute(update(schema.head).values(**head))
