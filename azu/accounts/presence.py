"""Which coordinators share the ledger and are alive: each makes a number of its own in the database grow all the time.

    beat ─► 1, 2, 3, ...        others have seen it grow within LEASE_S: it leads what it leads
    silence for LEASE_S         others may claim what it led, and take it off the list: it learns so with its next beat

No two clocks are compared: everybody measures by its own for how long a number has not grown, and only while it reads
the database without a gap. Who could not beat for LEASE_S asks before it ends a job (`is_sure`).

Who sees nobody else alive only looks, which costs the database no commit, and beats as soon as anything has changed:
whoever comes, or comes back, watches for LEASE_S before it takes anybody for gone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import trio
from sqlalchemy import Connection, delete, insert, select, update

from azu.errors import AzuError
from azu.ledger import Ledger, schema
from azu.logs import log

__all__ = ["LEASE_S", "Presence", "Watch"]

logger = logging.getLogger(__name__)

BEAT_S = 2.0
LEASE_S = 10.0

_TABLE = schema.coordinators


class Watch:
    """What was seen of others' beats. Pure: `now` is in seconds of any clock that only runs forward."""

    def __init__(self) -> None:
        self._beats: dict[str, int] = {}
        self._grown_at: dict[str, float] = {}
        self._looked_at = 0.0

    def look(self, beats: Mapping[str, int], now: float) -> frozenset[str]:
        """Take what the database has now; who is alive by it."""
        has_gap = now > self._looked_at + LEASE_S / 2  # nobody's silence can be told from ours
        for peer_id, beat in beats.items():
            if has_gap or self._beats.get(peer_id) != beat:
                self._grown_at[peer_id] = now
        self._beats, self._looked_at = dict(beats), now
        return frozenset(peer_id for peer_id in beats if now < self._grown_at[peer_id] + LEASE_S)

    def beat_of(self, peer_id: str) -> int | None:
        """The last number seen; None where it was not on the list."""
        return self._beats.get(peer_id)


class Presence:
    """One coordinator's sight of those that share its ledger. Current while `run` runs.

    Attributes:
        alive: the peer ids of those that live, this one's among them.
        life: grows when others had taken this one for gone.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.me = ledger.owner
        self.alive = frozenset({self.me})
        self.life = 0
        self._ledger = ledger
        self._watch = Watch()
        self._rows: list[_Row] | None = None  # as they were last seen
        self._beat_at = trio.current_time()
        self._looked = trio.Event()  # set with each look, and then replaced

    async def run(self, url: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat, and see others beat, until cancelled, which takes this one off the list.

        Args:
            url: where clients that others send here find it; empty where that is not known.

        Raises:
            InternalError: the database cannot be used at the start.
        """
        await self._beat(url)
        task_status.started()
        try:
            while True:
                await trio.sleep(BEAT_S)
                try:
                    await self._beat(url)
                except AzuError as error:  # a border: it is tried again
                    log(logger, logging.WARNING, "coordinator cannot show that it lives", reason=error.message)
        finally:
            with trio.move_on_after(BEAT_S, shield=True):
                await self._leave()

    @property
    def is_sure(self) -> bool:
        """Whether nobody can have claimed what this coordinator leads, if it did in this `life`."""
        return trio.current_time() < self._beat_at + LEASE_S

    def is_gone(self, peer_id: str | None) -> bool:
        """Whether a leader leads no more."""
        return peer_id not in self.alive

    def take_off(self, connection: Connection, peer_id: str) -> bool:
        """Take one that `is_gone` off the list; False where it lives after all. Within a transaction."""
        query = select(_TABLE.c.beat).where(_TABLE.c.peer_id == peer_id).with_for_update()
        beat = connection.execute(query).scalar_one_or_none()
        if beat not in (None, self._watch.beat_of(peer_id)):
            return False
        _remove(peer_id, connection)
        return True

    def url_of(self, peer_id: str) -> str:
        """Where clients find a coordinator; empty where that is not known."""
        return next((row.url for row in self._rows or () if row.peer_id == peer_id), "")

    def others(self) -> tuple[str, ...]:
        """Those that live besides this one."""
        return tuple(sorted(self.alive - {self.me}))

    async def lives(self, peer_id: str) -> bool:
        """Whether another coordinator is alive: wait for a beat of it that is new, or until it is gone."""
        beat = self._watch.beat_of(peer_id)
        while peer_id in self.alive and self._watch.beat_of(peer_id) == beat:
            await self._looked.wait()
        return peer_id in self.alive

    async def confirm(self) -> None:
        """Beat now, so that nobody claims anything from here on for a while."""
        await self._beat(self.url_of(self.me))

    async def _leave(self) -> None:
        try:
            await self._ledger.write(partial(_remove, self.me))
        except AzuError as error:  # a border: others see that it is gone after a while
            log(logger, logging.WARNING, "coordinator cannot show that it leaves", reason=error.message)

    async def _beat(self, url: str) -> None:
        started = trio.current_time()
        rows = None if self.others() else await self._ledger.read(_look)
        if rows is None or rows != self._rows:
            was_gone: list[bool] = []
            rows = await self._ledger.write(partial(_beat, self.me, url, was_gone))
            self.life += any(was_gone)
        self._beat_at, self._rows = started, rows
        self.alive = self._watch.look({row.peer_id: row.beat for row in rows}, trio.current_time()) | {self.me}
        self._looked.set()
        self._looked = trio.Event()


class _Row(NamedTuple):
    peer_id: str
    beat: int
    url: str


def _look(connection: Connection) -> list[_Row]:
    rows = connection.execute(select(*(_TABLE.c[name] for name in _Row._fields)).order_by(_TABLE.c.peer_id))
    return [_Row(*row) for row in rows]


def _beat(me: str, url: str, was_gone: list[bool], connection: Connection) -> list[_Row]:
    """was_gone: whether others had taken it off the list, in each try; the last one finds what one before committed."""
    query = update(_TABLE).where(_TABLE.c.peer_id == me).values(beat=_TABLE.c.beat + 1, url=url)
    was_gone.append(not connection.execute(query).rowcount)
    if was_gone[-1]:
        connection.execute(insert(_TABLE), {"peer_id": me, "beat": 1, "url": url})
    return _look(connection)


def _remove(me: str, connection: Connection) -> None:
    connection.execute(delete(_TABLE).where(_TABLE.c.peer_id == me))
