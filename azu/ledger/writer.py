"""One thread that writes: it takes all operations that wait, and commits them together.

    task ── do() ──► queue (bounded) ──► thread: fill a page, decide all, write it, commit ──► tasks wake up

Whoever waits for an answer gets it after the commit. If it is cancelled before the thread took its operation, nothing
happens; later, the operation happens all the same, and asking for it again gives its answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any, Self, TypeVar

import outcome
import trio
from sqlalchemy import Connection

from azu.errors import AzuError, InternalError
from azu.ledger.database import Database
from azu.ledger.page import Operation
from azu.ledger.store import KeyLimits, commit_group
from azu.logs import log

__all__ = ["Writer"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING = 4096  # operations; some MB. Whoever comes then waits for room
MAX_GROUP = 512  # operations in one commit: some 50 ms, for which other coordinators wait


class _Call:
    """An operation, or other work in a transaction of its own, and whoever waits for it."""

    def __init__(self, work: Operation[Any] | Callable[[Connection], Any]) -> None:
        self.work = work
        self.done = trio.Event()
        self.outcome: outcome.Outcome[Any] = outcome.Error(InternalError("the ledger did not answer"))


class Writer:
    """Writes to the database in its own thread for as long as its context lasts; what waits at the end is written."""

    def __init__(self, database: Database, key_limits: KeyLimits | None) -> None:
        self._database = database
        self._key_limits = key_limits
        self._waiting: OrderedDict[_Call, None] = OrderedDict()  # a queue that whoever is cancelled leaves at once
        self._changed = threading.Condition()
        self._is_closing = False
        self._room = trio.Semaphore(MAX_WAITING)
        self._token = trio.lowlevel.current_trio_token()
        # No thread of trio's: a nursery for it would wrap what the context's body raises.
        self._thread = threading.Thread(target=self._loop, name="azu-ledger", daemon=True)

    async def do(self, work: Operation[T] | Callable[[Connection], T]) -> T:
        """Have it done and committed; for cancellation see the module.

        Raises:
            InternalError: the database cannot be used.
        """
        call = _Call(work)
        async with self._room:
            self._put(call)
            try:
                await call.done.wait()
            finally:
                if not call.done.is_set():
                    self._withdraw(call)
        result: T = call.outcome.unwrap()
        return result

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)

    def _put(self, call: _Call) -> None:
        with self._changed:
            if self._is_closing:
                raise InternalError("the ledger is closed", code="ledger_closed")
            self._waiting[call] = None
            self._changed.notify()

    def _withdraw(self, call: _Call) -> None:
        with self._changed:
            self._waiting.pop(call, None)

    # --- in the thread

    def _loop(self) -> None:
        while calls := self._next_group():
            self._answer(calls)
            try:
                self._token.run_sync_soon(_wake, calls)
            except trio.RunFinishedError:  # nobody is left to be told; what is committed stays
                return

    def _next_group(self) -> list[_Call]:
        """Operations that can share a transaction, or one piece of other work; nothing once closed."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return []
                self._changed.wait()
            operations = takewhile(lambda call: not callable(call.work), self._waiting)
            calls = list(islice(operations, MAX_GROUP)) or [next(iter(self._waiting))]
            for call in calls:
                del self._waiting[call]
            return calls

    def _answer(self, calls: Sequence[_Call]) -> None:
        try:
            outcomes = self._database.write(partial(self._work, [call.work for call in calls]))
        except Exception as error:  # a border: the thread has to live, and whoever asked is told
            is_unreachable = isinstance(error, AzuError) and error.code == "ledger_unreachable"
            if len(calls) > 1 and not is_unreachable:  # one of them may be to blame: the others must not suffer for it
                log(logger, logging.WARNING, "operations committed one by one", reason=str(error), count=len(calls))
                for call in calls:
                    self._answer([call])
                return
            outcomes = [outcome.Error(error) for _ in calls]
        for call, result in zip(calls, outcomes, strict=True):
            call.outcome = result

    def _work(self, works: Sequence[Any], connection: Connection) -> Sequence[outcome.Outcome[Any]]:
        if callable(works[0]):
            return [outcome.Value(works[0](connection))]
        return commit_group(connection, works, int(time.time()), self._key_limits)


def _wake(calls: Sequence[_Call]) -> None:
    for call in calls:
        call.done.set()
