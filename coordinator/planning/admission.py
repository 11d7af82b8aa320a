"""Whose turn it is: a bounded queue of jobs that wait for room, fair by account. Sans-IO; time is an argument.

**Fairness** is start-time fair queueing (Goyal, Vin and Cheng, 1996): an account's next job may start when what it was
given so far, counted in KV cache positions, is the least. An account that was away catches up with the others and gets
nothing for its absence. Within an account the first come is the first served. Over any time in which two accounts
always have jobs waiting, what they were given differs by no more than one job of each.

**Room.** The first in turn that fits is taken, so that a large job does not keep small ones from room that it cannot
use, nor a job for one model those for another. One that was overtaken by `MAX_OVERTAKEN` jobs of its model keeps all
later ones of that model waiting until it fits: room then comes together for it.

**Bounds.** At most `limit` jobs wait. When they do, and the account of a newcomer has fewer of them than another has,
the last job of the account with the most makes room: one account cannot fill the queue.

Complexity: O(n log n) for n waiting jobs, for each call; n is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["FairQueue", "Waiting"]

Item = TypeVar("Item")
Grant = TypeVar("Grant")

MAX_OVERTAKEN = 16
# What a time between two admissions weighs in the average, against all that were before.
_NEWEST = 0.2
_LONGEST_S = 600.0
# Accounts that were given something lately are remembered, so many times as jobs may wait.
_REMEMBERED = 16


@dataclass(eq=False, slots=True)
class Waiting(Generic[Item]):
    """A job in the queue: `cost` in positions of KV cache, `kind` its model."""

    item: Item
    account: str
    kind: str
    cost: int
    number: int
    since: float
    overtaken: int = 0


@dataclass(slots=True)
class _Account(Generic[Item]):
    start: float  # when its next job may start, in positions given to each account
    jobs: deque[Waiting[Item]] = field(default_factory=deque)


class FairQueue(Generic[Item]):
    """Jobs that wait, by account; at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._accounts: dict[str, _Account[Item]] = {}  # with jobs, or with a start that is still ahead
        self._now = 0.0  # the start of the last job that was taken
        self._number = 0
        self._count = 0
        self._turned_s: float | None = None  # average time from one admission to the next, while jobs wait
        self._turned_at = 0.0

    def __len__(self) -> int:
        return self._count

    def submit(
        self, item: Item, account: str, kind: str, cost: int, now: float
    ) -> tuple[Waiting[Item] | None, Waiting[Item] | None]:
        """Have a job wait at `now` (seconds): its place or None where there is none, and who lost its place for it."""
        dropped = None
        if self._count >= self._limit and (dropped := self._drop_for(account)) is None:
            return None, None
        if not self._count:
            self._turned_at = now
        self._number += 1
        waiting = Waiting(item, account, kind, cost, self._number, now)
        mine = self._accounts.setdefault(account, _Account(self._now))
        if not mine.jobs:
            mine.start = max(mine.start, self._now)
        mine.jobs.append(waiting)
        self._count += 1
        return waiting, dropped

    def _drop_for(self, account: str) -> Waiting[Item] | None:
        mine = self._accounts.get(account)
        fullest = max(
            self._accounts.values(), key=lambda each: (len(each.jobs), each.jobs[-1].number if each.jobs else 0)
        )
        if len(fullest.jobs) <= (len(mine.jobs) if mine else 0) + 1:
            return None
        last = fullest.jobs[-1]
        self.cancel(last)
        return last

    def cancel(self, waiting: Waiting[Item]) -> None:
        """Take a job out that does not wait any more; nothing where it is out already."""
        mine = self._accounts.get(waiting.account)
        if mine is not None and waiting in mine.jobs:
            mine.jobs.remove(waiting)
            self._count -= 1
            self._forget(waiting.account)

    def take(self, find: Callable[[Item], Grant | None], now: float) -> tuple[Waiting[Item], Grant] | None:
        """The first job in turn that `find` grants room, with what it was granted; it is out of the queue."""
        passed: list[Waiting[Item]] = []
        held_up: set[str] = set()
        for waiting, _ in self._in_turn():
            if waiting.kind in held_up:
                continue
            if (grant := find(waiting.item)) is not None:
                self._give(waiting, now)
                for each in passed:
                    each.overtaken += each.kind == waiting.kind
                return waiting, grant
            passed.append(waiting)
            if waiting.overtaken >= MAX_OVERTAKEN:
                held_up.add(waiting.kind)
        return None

    def _in_turn(self) -> Iterator[tuple[Waiting[Item], float]]:
        """All jobs in the order in which they would be taken if each fitted, with their starts."""
        starts: list[tuple[float, int, Waiting[Item]]] = []
        for account in self._accounts.values():
            start = account.start
            for waiting in account.jobs:
                starts.append((start, waiting.number, waiting))
                start += waiting.cost
        for start, _, waiting in sorted(starts, key=lambda each: each[:2]):
            yield waiting, start

    def _give(self, waiting: Waiting[Item], now: float) -> None:
        mine = self._accounts[waiting.account]
        self._now = max(self._now, mine.start)
        mine.start += waiting.cost
        mine.jobs.remove(waiting)
        self._count -= 1
        if now > waiting.since:  # who is let in at once says nothing of how long it takes
            passed = now - self._turned_at
            self._turned_s = passed if self._turned_s is None else (1 - _NEWEST) * self._turned_s + _NEWEST * passed
        self._turned_at = now
        for account in list(self._accounts):
            self._forget(account)
        if not self._count or len(self._accounts) > _REMEMBERED * self._limit:
            # Where nobody waits nobody was kept from anything, and there is nothing to make up for.
            self._accounts = {account: each for account, each in self._accounts.items() if each.jobs}

    def _forget(self, account: str) -> None:
        """Remember no account that has no jobs and nothing to make up for."""
        mine = self._accounts[account]
        if not mine.jobs and mine.start <= self._now:
            del self._accounts[account]

    def retry_after_s(self, account: str) -> float | None:
        """In how many seconds a job of this account would have its turn; None where nothing is known of that yet."""
        if self._turned_s is None:
            return None
        mine = self._accounts.get(account)
        start = max(self._now, mine.start + sum(each.cost for each in mine.jobs)) if mine else self._now
        ahead = sum(other <= start for _, other in self._in_turn())
        return min((ahead + 1) * self._turned_s, _LONGEST_S)
