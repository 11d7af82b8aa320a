"""Bringing a ledger's tables up to this version of azu, by Alembic."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from azu.errors import InputError

__all__ = ["is_current", "upgrade"]

_LOCK = 0x617A75  # "azu": of PostgreSQL's advisory locks, the one that upgrades take


def upgrade(connection: Connection, name: str) -> None:
    """Make the tables, or change them, inside the connection's transaction; one that waits for another finds it done.

    Raises:
        InputError: code "ledger_newer", where a newer azu has written it.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if not is_current(connection, name):
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_current(connection: Connection, name: str) -> bool:
    """Whether the tables are those of this version of azu; raises as `upgrade` does."""
    current = MigrationContext.configure(connection).get_current_revision()
    known, latest = _revisions()
    if current is not None and current not in known:
        raise InputError(
            f"the ledger {name} was written by a newer version of azu (revision {current[:40]})",
            code="ledger_newer",
            remedy="Install that version, or a newer one",
        )
    return current == latest


@cache
def _revisions() -> tuple[frozenset[str], str | None]:
    scripts = ScriptDirectory.from_config(_config())
    return frozenset(script.revision for script in scripts.walk_revisions()), scripts.get_current_head()


def _config() -> Config:
    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
