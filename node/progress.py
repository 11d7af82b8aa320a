"""What a stage holds of a job, whatever becomes of the ring around it."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from node.engine.stage import JobState
from node.history import History

__all__ = ["Progress"]


@dataclass(eq=False, slots=True)
class Progress:
    """One job in one stage. Changed between steps only, on the event loop.

    positions: that went through its layers. tokens: the sampled ones that it knows, as the first or the last stage.
    """

    history: History
    state: JobState | None = None
    positions: int = 0
    prompt: tuple[int, ...] = ()
    prompt_came: trio.Event = field(default_factory=trio.Event)
    tokens: list[int] = field(default_factory=list)

    def inherit(self, state: JobState) -> None:
        """Go on from another worker's cache. What that one sent on is not here, so it cannot be sent again."""
        self.state, self.positions = state, state.position
        self.history.begin(state.position)

    def clear(self) -> None:
        """Begin at position 0 again."""
        self.state, self.positions = None, 0
        self.history.clear()
