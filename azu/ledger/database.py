"""The ledger's database: SQLite in a file, or PostgreSQL by URL. Errors of SQLAlchemy and the drivers end here.

Writers take turns: SQLite has one at a time (BEGIN IMMEDIATE), and in PostgreSQL each locks the one row of `head`
first. With one lock there is no order to keep and no deadlock; groups of operations make up for the waiting.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, insert, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from azu.errors import InputError, InternalError
from azu.ledger import schema
from azu.ledger.digests import GENESIS
from azu.ledger.upgrade import is_current, upgrade
from azu.logs import log

__all__ = ["Database"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BUSY_S = 20.0  # other writers' groups take milliseconds; one that hangs is cut off by _SESSION after 15 s
_RETRY_S = 30.0  # as long as a restart of the database takes
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 1.0

# Serialisation failure, deadlock, lock not available, shutdown and start-up, idle transaction cut off, lost connection.
_TRANSIENT_STATES = {"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "25P03", "08000", "08003", "08006", "08001"}
# A coordinator that hangs, or whose machine is gone, must not keep the others from writing.
_SESSION = (
    "SET idle_in_transaction_session_timeout = '15s'",
    "SET lock_timeout = '20s'",
    "SET statement_timeout = '60s'",
    "SET timezone = 'UTC'",
)
_SOCKET = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "application_name": "azu",
}


class Database:
    """One ledger. Methods block, and may be called from any thread.

    Args:
        url: a file for SQLite, sqlite:///FILE or postgresql://USER@HOST/NAME.

    Raises:
        InputError: code "bad_ledger_url".
    """

    def __init__(self, url: str | Path) -> None:
        self._url = URL.create("sqlite", database=str(url)) if isinstance(url, Path) else _parsed(url)
        self.name = self._url.difference_update_query(["password"]).render_as_string(hide_password=True)
        self._engine = _engine(self._url)
        if self._is_sqlite:
            event.listen(self._engine, "connect", _set_pragmas)
            event.listen(self._engine, "begin", _begin_sqlite)
        else:
            event.listen(self._engine, "connect", _set_session)

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def prepare(self, currency: str) -> None:
        """Make the tables or bring them up to date, and see that the ledger is kept in this currency.

        Raises:
            InputError: it is in another currency, or of a newer version of azu.
            InternalError: it cannot be used.
        """
        if self._is_sqlite:
            _make_private(Path(str(self._url.database)))

        def work(connection: Connection) -> None:
            upgrade(connection, self.name)  # which whoever else starts waits for
            self._begin(connection, currency)

        self.write(work)

    def check(self) -> None:
        """See that the ledger is there and of this version of azu, and leave it as it is.

        Raises:
            InputError: it is not. InternalError: it cannot be used.
        """
        path = Path(str(self._url.database))
        if self._is_sqlite and not path.exists():
            raise _missing(self.name)
        with self.reading() as connection:
            if not is_current(connection, self.name):
                raise _missing(self.name)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction, and again where the database asks for that, or was away for a while.

        It may have been committed before the connection was lost: it has to find out for itself.

        Raises:
            InternalError: the database cannot be used; code "ledger_unreachable" where trying again did not help.
        """
        begun = time.monotonic()
        pause = _FIRST_PAUSE_S
        while True:
            try:
                with self._writing() as connection:
                    return work(connection)
            except DBAPIError as error:
                if not _is_transient(error):
                    raise self._failed(error) from error
                if time.monotonic() > begun + _RETRY_S:
                    raise self._failed(error, code="ledger_unreachable") from error
                if pause == _LONGEST_PAUSE_S:  # it is more than a conflict with another writer
                    log(logger, logging.WARNING, "ledger's database is away", ledger=self.name, reason=_told(error))
            except SQLAlchemyError as error:
                raise self._failed(error) from error
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - so that two do not meet again
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` on one consistent state of the ledger.

        Raises:
            InternalError: the database cannot be used.
        """
        with self.reading() as connection:
            return work(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one consistent state of the ledger; raises as `read` does."""
        options: dict[str, Any] = {}
        if not self._is_sqlite:
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        try:
            with self._engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(azu_writes=True) as connection, connection.begin():
            yield connection

    def _begin(self, connection: Connection, currency: str) -> None:
        known = connection.execute(select(schema.head.c.currency).with_for_update()).scalar_one_or_none()
        if known is None:
            first = {"id": 1, "seq": 0, "digest": GENESIS, "currency": currency}
            connection.execute(insert(schema.head), first)
        elif known != currency:
            raise InputError(
                f"the ledger {self.name} is kept in {known}, not in {currency}",
                code="ledger_currency",
                remedy="Use the payment provider that it was begun with, or another ledger (--ledger-url)",
            )

    def _failed(self, error: SQLAlchemyError, *, code: str = "ledger_failed") -> InternalError:
        return InternalError(
            f"the ledger {self.name} cannot be used: {_told(error)}",
            code=code,
            remedy="Check that its disk is not full, that it is not damaged, and that the database can be reached",
        )


def _parsed(text: str) -> URL:
    remedy = "Write it like sqlite:////var/lib/azu/ledger.sqlite3 or postgresql://azu@db.example.org/azu"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError("the ledger's URL cannot be read", code="bad_ledger_url", remedy=remedy) from error
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database and url.database != ":memory:":
        return url
    problem = "the ledger has to be a file of SQLite or a database of PostgreSQL"
    raise InputError(problem, code="bad_ledger_url", remedy=remedy)


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        return create_engine(url, connect_args={"timeout": _BUSY_S, "check_same_thread": False})
    given = {name: value for name, value in _SOCKET.items() if name not in url.query}
    return create_engine(url, connect_args=given, pool_pre_ping=True)


def _missing(name: str) -> InputError:
    remedy = "Start azu-coordinator serve on it once, or name another with --data-dir or --ledger-url"
    return InputError(f"there is no ledger of this version of azu in {name}", code="no_ledger", remedy=remedy)


def _make_private(path: Path) -> None:
    """A new file for its owner's eyes only; those that SQLite puts beside it get the same mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise InternalError(
            f"the ledger {path} cannot be opened: {error.strerror}",
            code="ledger_failed",
            remedy="Give --data-dir a folder that this user may write to",
        ) from error


def _set_session(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        for setting in _SESSION:
            cursor.execute(setting)
    connection.commit()


def _set_pragmas(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # else sqlite3 begins and commits as it likes
    connection.execute("PRAGMA journal_mode = WAL")
    # A commit is on disk when it returns; NORMAL would not sync the log.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("azu_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _told(error: SQLAlchemyError) -> str:
    """What the driver said, in one line."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(cause).split())[:300]


def _is_transient(error: DBAPIError) -> bool:
    cause = error.orig
    if error.connection_invalidated or getattr(cause, "sqlstate", None) in _TRANSIENT_STATES:
        return True
    if getattr(cause, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
        return True
    # psycopg cannot connect: it has no state to tell why
    return (
        type(cause).__name__ == "OperationalError"
        and type(cause).__module__.startswith("psycopg")
        and (getattr(cause, "sqlstate", None) is None)
    )
