"""Triggers against changes of what is written, in both dialects; for use in revisions."""

from __future__ import annotations

from alembic import op

__all__ = ["forbid_changes", "forbid_deletes"]

_FUNCTION = """
CREATE OR REPLACE FUNCTION azu_keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'the ledger keeps what is written: % of % is refused', TG_OP, TG_TABLE_NAME; END $$
"""
_MESSAGE = "the ledger keeps what is written"


def forbid_changes(table: str, *, unless: str | None = None) -> None:
    """Let no row be changed but where the condition over OLD and NEW holds; without one, none be deleted either."""
    if unless is None:
        forbid_deletes(table)
    _forbid(table, "UPDATE", unless)


def forbid_deletes(table: str) -> None:
    """Let no row be deleted, nor all of them at once."""
    _forbid(table, "DELETE", None)
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE TRIGGER {table}_truncate_kept BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION azu_keep()"
        )


def _forbid(table: str, event: str, unless: str | None) -> None:
    name = f"{table}_{event.lower()}_kept"
    when = f"WHEN (NOT ({unless}))" if unless else ""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(_FUNCTION)
        op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON {table} FOR EACH ROW {when} EXECUTE FUNCTION azu_keep()")
    else:
        op.execute(
            f"CREATE TRIGGER {name} BEFORE {event} ON {table} {when} BEGIN SELECT RAISE(ABORT, '{_MESSAGE}'); END"
        )
