"""Who may take how much of a worker's KV cache. Pure: no torch, no trio.

Memory is given out in blocks as jobs grow, since most answers end long before `max_tokens`: a job is let in where its
prompt fits, and not only where all does that it may ever need. What keeps this safe is the banker's rule (Dijkstra,
EWD 108): a block is given only if afterwards all jobs could take all that they may need one after the other, the oldest
first. So the oldest never waits, and who waits keeps what it has. vLLM and others take a young job's cache away instead
and compute it again later, which in a ring would cost every stage.

Age is what the tickets say. Stages of one ring so agree on who goes first, and no two jobs wait for each other in
different stages: the oldest of all is the oldest in each of its stages, comes to its end, and leaves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from azu.errors import InternalError

__all__ = ["BLOCK", "KvBlocks"]

BLOCK = 16  # positions, as in vLLM

J = TypeVar("J", bound=Hashable)


@dataclass(slots=True)
class _Share:
    """A job's part, in blocks. limit: the most that it may come to need."""

    age: tuple[int, bytes]
    limit: int
    held: int

    @property
    def lacks(self) -> int:
        return self.limit - self.held


class KvBlocks(Generic[J]):
    """The blocks of one worker.

    Args:
        tokens: positions of KV cache, of which what does not fill a block is left over.
        block: positions that are given out together.
    """

    def __init__(self, tokens: int, block: int = BLOCK) -> None:
        self.block = block
        self._total = tokens // block
        self._shares: dict[J, _Share] = {}  # the oldest first

    @property
    def tokens(self) -> int:
        """Positions that there are."""
        return self._total * self.block

    @property
    def free(self) -> int:
        """Positions that no job has."""
        return self._free * self.block

    @property
    def room(self) -> int:
        """Positions that a job which is younger than all others may begin with."""
        return self._spare(len(self._shares)) * self.block

    def can_enter(self, age: tuple[int, bytes], tokens: int, limit: int) -> bool:
        """Whether a job may begin with `tokens` positions that may come to need `limit`."""
        older = sum(share.age < age for share in self._shares.values())
        given_back = sum(share.held for share in list(self._shares.values())[:older])
        fits_now = self._blocks(tokens) <= self._spare(older)
        return fits_now and self._blocks(limit) <= self._free + given_back  # younger ones have as much ahead as before

    def enter(self, job: J, age: tuple[int, bytes], tokens: int, limit: int) -> None:
        """Let a job begin, which `can_enter` was asked for."""
        if job in self._shares or not self.can_enter(age, tokens, limit):
            raise InternalError("a job takes KV cache that it was not to have")
        self._shares[job] = _Share(age, self._blocks(limit), self._blocks(tokens))
        self._shares = dict(sorted(self._shares.items(), key=lambda item: item[1].age))

    def grow(self, job: J, tokens: int) -> bool:
        """Let a job have `tokens` positions, or leave it as it is; False where it has to wait for others to leave."""
        share = self._shares[job]
        more = self._blocks(tokens) - share.held
        if more <= 0:
            return True
        if more > share.lacks:
            raise InternalError("a job takes more KV cache than its ticket names")
        if more > self._spare(list(self._shares).index(job)):
            return False
        share.held += more
        return True

    def leave(self, job: J) -> None:
        """Take back what a job has, if it has anything."""
        self._shares.pop(job, None)

    def check_integrity(self) -> None:
        """See that nothing is given out twice, and that all jobs can come to their end, the oldest first.

        Raises:
            InternalError: it is not so.
        """
        shares = list(self._shares.values())
        is_sound = self._free >= 0 and all(0 <= share.held <= share.limit for share in shares)
        is_sorted = shares == sorted(shares, key=lambda share: share.age)
        if not (is_sound and is_sorted and all(share.lacks <= free for share, free in self._in_turn())):
            raise InternalError("the KV cache is given out wrongly")

    @property
    def _free(self) -> int:
        return self._total - sum(share.held for share in self._shares.values())

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def _in_turn(self) -> Iterator[tuple[_Share, int]]:
        """Each share, and the blocks that are free at its turn: those now, and what older ones will have given back."""
        free = self._free
        for share in self._shares.values():
            yield share, free
            free += share.held

    def _spare(self, older: int) -> int:
        """Blocks that may be given to whoever has so many older than itself, without a harm to them."""
        spare = [free - share.lacks for share, free in self._in_turn()][:older]
        return min([self._free, *spare])
