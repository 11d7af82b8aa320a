"""Iterative Kademlia look-ups over disjoint paths.

Maymounkov and Mazieres, Kademlia (2002): ask the peers closest to a key for closer ones, until the K closest known have
been asked. Baumgart and Mies, S/Kademlia (2007): do so on several paths at once of which each starts with other peers
and none asks a peer that another has asked; then an attacker has to be on all of them to keep the answer from us.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID

from azu.errors import AzuError
from azu.overlay.faults import reason

__all__ = ["K", "Hop", "Lookup", "Trace"]

K = 20  # peers that store a value, and that a look-up ends with
PATHS = 3
PARALLEL = 2  # queries of one path at once
QUERY_SECONDS = 5.0  # one peer, dialling included

Ask = Callable[[ID], Awaitable[Sequence[ID]]]


@dataclass(frozen=True, slots=True)
class Hop:
    """One peer that was asked.

    path: which of the disjoint paths asked it. named_by: the peer that named it first; None where the look-up began.
    shared_bits: the leading bits that its place in the key space shares with the key's. seconds: until its answer;
    None where none came. named: how many peers it named. error: why it did not answer.
    """

    peer_id: str
    path: int
    named_by: str | None
    shared_bits: int
    seconds: float | None
    named: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole look-up: the peers in the order in which they were asked, and those closest to the key that answered."""

    key: bytes
    hops: tuple[Hop, ...]
    closest: tuple[str, ...]


class Lookup:
    """One look-up, for `run` once.

    Args:
        key: not hashed yet, as it travels in messages.
        me: this node, which is never asked.
        ask: sends one peer the question, and returns the peers that it named and that can be dialled.
        enough: whether the answers so far will do.
    """

    def __init__(
        self, key: bytes, me: ID, seeds: Sequence[ID], ask: Ask, enough: Callable[[], bool] = lambda: False
    ) -> None:
        self._key = key
        self._place = _place(key)
        self._ask = ask
        self._enough = enough
        self._named_by: dict[ID, ID | None] = dict.fromkeys((seed for seed in seeds if seed != me), None)
        self._asked: dict[ID, Hop | None] = {me: None}
        self._order: list[ID] = []
        near = sorted(self._named_by, key=self._distance)
        self._paths = [_Path(index, set(near[index::PATHS])) for index in range(PATHS)]

    @property
    def closest(self) -> list[ID]:
        """The K closest peers that answered, the closest first."""
        answered = [peer for peer, hop in self._asked.items() if hop is not None and hop.seconds is not None]
        return sorted(answered, key=self._distance)[:K]

    @property
    def trace(self) -> Trace:
        """What has been done so far."""
        hops = [hop for peer in self._order if (hop := self._asked[peer]) is not None]
        return Trace(self._key, tuple(hops), tuple(map(str, self.closest)))

    async def run(self) -> None:
        """Ask until every path has nobody closer left to ask, or the answers will do. Safe to cancel."""
        async with trio.open_nursery() as nursery:
            for path in self._paths:
                for _ in range(PARALLEL):
                    nursery.start_soon(self._walk, path, nursery.cancel_scope)

    async def _walk(self, path: _Path, everything: trio.CancelScope) -> None:
        while (peer := self._next(path)) is not None or path.under_way:
            if peer is None:
                await path.progress.wait()
                continue
            path.under_way += 1
            self._asked[peer] = None
            self._order.append(peer)
            try:
                path.candidates.update(await self._query(peer, path))
            finally:
                path.under_way -= 1
                path.progress.set()
                path.progress = trio.Event()
            if self._enough():
                everything.cancel()

    def _next(self, path: _Path) -> ID | None:
        """The closest candidate that nobody has asked, if it is among the path's K closest that are not known dead."""
        alive = (peer for peer in path.candidates if (hop := self._asked.get(peer)) is None or hop.seconds is not None)
        nearest = sorted(alive, key=self._distance)[:K]
        return next((peer for peer in nearest if peer not in self._asked), None)

    async def _query(self, peer: ID, path: _Path) -> list[ID]:
        started = trio.current_time()
        named: list[ID] = []
        error = "no answer in time"
        seconds = None
        with trio.move_on_after(QUERY_SECONDS):
            try:
                named = [each for each in dict.fromkeys(await self._ask(peer)) if each != peer]
                seconds, error = trio.current_time() - started, ""
            except AzuError as fault:
                error = fault.message
            except Exception as fault:  # one peer's answer, or libp2p's trouble with it, concerns nobody else
                error = reason(fault)
        named_by = self._named_by[peer]
        self._asked[peer] = Hop(
            str(peer), path.index, None if named_by is None else str(named_by), self._shared_bits(peer), seconds,
            len(named), error,
        )  # fmt: skip
        for each in named:
            self._named_by.setdefault(each, peer)
        return named

    def _distance(self, peer: ID) -> int:
        return _place(peer.to_bytes()) ^ self._place

    def _shared_bits(self, peer: ID) -> int:
        return 256 - self._distance(peer).bit_length()


class _Path:
    """One of the disjoint paths: the peers that it has heard of."""

    def __init__(self, index: int, candidates: set[ID]) -> None:
        self.index = index
        self.candidates = candidates
        self.under_way = 0
        self.progress = trio.Event()


def _place(key: bytes) -> int:
    """Where a key or a peer lies in the key space."""
    return int.from_bytes(hashlib.sha256(key).digest())
