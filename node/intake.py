"""The receiving end of a ring: what the previous stage sends on one stream after another. `node/ring.py` is the other.

Only the previous stage may open one. At most one more than is in use is held, unread, and MAX_PART come after the first
in all; a newer one takes the held one's place, which its sender has given up. The ring goes on in it once the stream in
use ends in `moved`. One that ends in any other way is the end of the ring, whatever is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from azu.channel import Channel
from azu.errors import ProtocolError
from azu.wire.messages import Hello, Moved, Welcome

__all__ = ["Intake", "Part"]


@dataclass(eq=False, slots=True)
class Part:
    """One of the streams. scope: cancelled when it is of no use any more."""

    channel: Channel
    number: int
    due: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def its_turn(self) -> None:
        """Wait until everything on the stream before it has been read."""
        if self.number:
            await self.channel.send(Welcome())
            await self.due.wait()


class Intake:
    """The streams of one job from its previous stage.

    Args:
        expected: what that stage has to say on the first.
        peer_id: whose streams they have to be.
        max_body: largest body in bytes that it may send.

    Attributes:
        peer_id: the previous stage's.
    """

    def __init__(self, expected: Hello, peer_id: str, max_body: int) -> None:
        self._expected = expected
        self.peer_id = peer_id
        self._max_body = max_body
        self._current: Part | None = None
        self._held: Part | None = None
        self._newest = 0
        self._is_closed = False

    @property
    def channel(self) -> Channel | None:
        """The stream in use."""
        return self._current.channel if self._current is not None else None

    def admit(self, channel: Channel, hello: Hello) -> Part:
        """Take a stream in; it is read in its scope, after its turn has come.

        Raises:
            ProtocolError: it is not the previous stage's, or not after those that came.
        """
        if channel.peer_id != self.peer_id or hello.model_copy(update={"part": 0}) != self._expected:
            raise ProtocolError(f"{channel.peer_id} is not the previous stage of this job", code="not_a_neighbour")
        # The first comes through a relay, so that the second may be here before it.
        if not (hello.part > self._newest or (hello.part == 0 and self._current is None)):
            raise ProtocolError(f"part {hello.part} of the ring came out of turn", code="bad_part")
        channel.limit_body(self._max_body)
        part = Part(channel, hello.part)
        if self._is_closed:
            part.scope.cancel()
        if hello.part == 0:
            self._current = part
            return part
        if self._held is not None:
            self._held.scope.cancel()
        self._held, self._newest = part, hello.part
        return part

    async def follow(self, moved: Moved) -> None:
        """Go on in the held stream; the one in use gets no more credit, and is to be closed.

        Raises:
            ProtocolError: that is not the one which the sender names.
        """
        last, following = self._current, self._held
        if last is None or following is None or moved.part != following.number:
            raise ProtocolError(f"part {moved.part} of the ring is not here", code="bad_part")
        self._current, self._held = following, None
        await last.channel.send(moved)  # after any credit that is being written
        following.due.set()

    def close(self) -> None:
        """Stop reading."""
        self._is_closed = True
        for part in (self._current, self._held):
            if part is not None:
                part.scope.cancel()
