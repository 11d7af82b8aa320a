"""Which piece to ask of whom: pure, without a clock or chance of its own.

Each missing piece is asked of one peer at a time. A peer first gets on with files that are begun, so that they are soon
whole and can be handed on; then it begins the one that fewest peers have, and among those the one that was given out
least (rarest first: Legout et al., "Rarest First and Choke Algorithms Are Enough", IMC 2006). When nothing is left to
begin, an idle peer is asked for what another one takes too long for (their end game), so that the slowest does not
decide how long it all takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Piece", "Schedule"]

_MAX_ASKED = 2  # peers of which one piece is asked at once
_PATIENCE_S = 1.0  # nothing is asked of a second peer before that


@dataclass(frozen=True, order=True, slots=True)
class Piece:
    """One piece of a file: the file's digest, and which one it is."""

    digest: str
    index: int


@dataclass
class _File:
    rank: float
    todo: list[int]  # a heap of pieces that are asked of nobody: in order, so that the whole file's hash keeps up
    left: int  # pieces that are not stored yet
    holders: dict[str, int] = field(default_factory=dict)  # peer -> how often it was asked for this file
    begun: bool = False
    claimed: bool = False

    def order(self) -> tuple[bool, int, int, float]:
        return not self.begun, len(self.holders), min(self.holders.values(), default=0), self.rank


@dataclass
class _Peer:
    flying: list[Piece] = field(default_factory=list)  # asked for and not received
    turn: float = 0.0  # when its last piece came
    pace: float = 0.0  # seconds for one, smoothed


class Schedule:
    """The state of one fetch. `now` is in seconds of any steady clock.

    Args:
        files: the missing pieces of each file, by digest.
        ranks: file -> which comes first where all else is equal; let it differ from worker to worker.
        depth: pieces asked of one peer at once, so that the next is under way before the last has come.
    """

    def __init__(self, files: Mapping[str, Iterable[int]], ranks: Mapping[str, float], *, depth: int) -> None:
        self._files: dict[str, _File] = {}
        for digest, missing in files.items():
            pieces = sorted(missing)
            self._files[digest] = _File(ranks[digest], pieces, len(pieces))
        self._depth = depth
        self._peers: dict[str, _Peer] = {}
        self._asked: dict[Piece, dict[str, float]] = {}  # peers that a missing piece is asked of, and when
        self._landing: dict[Piece, str] = {}  # received and not judged yet, and of whom

    @property
    def missing(self) -> list[str]:
        """The files that are not whole yet."""
        return [digest for digest, file in self._files.items() if file.left]

    @property
    def orphans(self) -> list[str]:
        """Those of `missing` that no peer has, and that nothing is under way of."""
        busy = {piece.digest for piece in self._asked}
        return [digest for digest in self.missing if not self._files[digest].holders and digest not in busy]

    def offer(self, peer: str, holds: Mapping[str, int]) -> None:
        """Note all that a peer has now, and how often it was asked for each of it."""
        self._peers.setdefault(peer, _Peer())
        for digest, file in self._files.items():
            file.holders.pop(peer, None)
            if digest in holds:
                file.holders[peer] = holds[digest]

    def claim(self, digest: str, claimed: bool) -> None:
        """Let nothing be asked of a file that comes another way, or let it again."""
        self._files[digest].claimed = claimed

    def next(self, peer: str, now: float) -> Piece | None:
        """The piece to ask of a peer now, which then counts as asked of it; None where there is none for it."""
        state = self._peers.get(peer)
        if state is None or len(state.flying) >= self._depth:
            return None
        piece = self._fresh(peer) or self._late(peer, state, now)
        if piece is not None:
            self._asked.setdefault(piece, {})[peer] = now
            state.flying.append(piece)
        return piece

    def _fresh(self, peer: str) -> Piece | None:
        files = [
            (file.order(), digest)
            for digest, file in self._files.items()
            if file.todo and peer in file.holders and not file.claimed
        ]
        if not files:
            return None
        digest = min(files)[1]
        self._files[digest].begun = True
        return Piece(digest, heapq.heappop(self._files[digest].todo))

    def _late(self, peer: str, state: _Peer, now: float) -> Piece | None:
        """What others have owed for longest, if it is longer than this peer would take for it."""
        patience = max(_PATIENCE_S, 2 * state.pace)
        late = [
            (min(asked.values()), piece)
            for piece, asked in self._asked.items()
            if len(asked) < _MAX_ASKED
            and peer not in asked
            and piece not in self._landing
            and peer in self._files[piece.digest].holders
            and now - min(asked.values()) >= patience
        ]
        return min(late)[1] if late else None

    def received(self, peer: str, piece: Piece, now: float) -> bool:
        """A peer has sent a piece; where True, it is to be stored, and `stored` or `failed` to be called.

        False where it is not needed any more, or another peer's is just being stored.
        """
        state = self._peers.get(peer)
        if state is None or piece not in state.flying:
            return False
        state.flying.remove(piece)
        asked = self._asked.get(piece)
        if asked is None:
            return False
        took = now - max(state.turn, asked[peer])
        state.pace = took if not state.pace else 0.7 * state.pace + 0.3 * took
        state.turn = now
        if piece in self._landing:
            del asked[peer]
            return False
        self._landing[piece] = peer
        return True

    def needs(self, piece: Piece) -> bool:
        """Whether a piece that was received is still missing: its file may have come another way meanwhile."""
        return piece in self._asked

    def stored(self, piece: Piece) -> bool:
        """A piece is verified and on disk; returns whether its file is whole with it."""
        self._landing.pop(piece, None)
        if self._asked.pop(piece, None) is None:
            return False
        file = self._files[piece.digest]
        file.left -= 1
        return file.left == 0

    def completed(self, digest: str) -> None:
        """A whole file came another way."""
        file = self._files[digest]
        file.left, file.todo = 0, []
        for piece in [piece for piece in self._asked if piece.digest == digest]:
            del self._asked[piece]

    def failed(self, peer: str, piece: Piece) -> None:
        """A piece will not come from a peer: it goes to another one."""
        state = self._peers.get(peer)
        if state is not None and piece in state.flying:
            state.flying.remove(piece)
        if self._landing.get(piece) == peer:
            del self._landing[piece]
        asked = self._asked.get(piece)
        if asked is None or asked.pop(peer, None) is None:
            return
        if not asked:
            del self._asked[piece]
            heapq.heappush(self._files[piece.digest].todo, piece.index)

    def drop(self, peer: str) -> None:
        """A peer is gone: what it has not sent yet goes to others."""
        self.offer(peer, {})
        for piece in list(self._peers[peer].flying):
            self.failed(peer, piece)
        del self._peers[peer]
