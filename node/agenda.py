"""What a leg's task has to do next, and when it has to stop.

A decoded token is computed and passed on without the job's task (`node/leg.py`), wherever nothing has to be waited for.
The task is woken for what is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from azu.wire.frames import Buffer
from azu.wire.messages import Token

__all__ = ["Agenda", "Input", "PausedError", "Result"]


@dataclass(frozen=True, slots=True)
class Input:
    """What a step is to be computed from, checked: hidden states, or a sampled token in the first stage.

    is_owed: whether its sender gets credit back for it.
    """

    position: int
    rows: int
    sample: bool
    body: Buffer = b""
    token: int = -1
    is_owed: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a step gave: hidden states of the positions from `position` on, or a token."""

    position: int
    rows: int
    body: Buffer
    token: Token | None


class PausedError(Exception):
    """The leg ends here."""


class Agenda:
    """One leg's. Used on the event loop only.

    Attributes:
        inputs: that wait.
        is_stepping: whether a step is being computed without the task; inputs wait for it, results do not.
    """

    def __init__(self) -> None:
        self.inputs: deque[Input] = deque()
        self.is_stepping = False
        self._results: deque[Result | Token] = deque()  # to be passed on
        self._error: Exception | None = None
        self._is_awaited = False
        self._changed = trio.Event()  # set with whatever is new, and then replaced
        self._paused = trio.Event()
        self._wait = trio.CancelScope()  # what is waited for between two steps

    @property
    def is_paused(self) -> bool:
        """Whether the leg ends after the step that is being computed."""
        return self._paused.is_set()

    @property
    def is_clear(self) -> bool:
        """Whether the task waits, and has nothing to do: a step can be computed without it."""
        is_idle = self._is_awaited and not (self.is_stepping or self.inputs or self._results)
        return is_idle and self._error is None and not self.is_paused

    def put(self, work: Input) -> None:
        """An input for the task."""
        self.inputs.append(work)
        self._changed.set()

    def landed(self) -> None:
        """A step without the task is over."""
        self.is_stepping = False
        if self.inputs or self.is_paused:
            self._changed.set()

    def pass_on(self, result: Result | Token) -> None:
        """Something for the task to pass on, before its next step."""
        self._results.append(result)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Let the task raise an error."""
        self._error = error
        self._changed.set()

    def pause(self) -> None:
        """End the leg after the step that is being computed."""
        self._paused.set()
        self._changed.set()
        self._wait.cancel()

    async def next(self) -> Input | Result | Token:
        """What comes next. Without a scope of its own, as the ring's next step may wait for this.

        Raises:
            PausedError: the leg ends.
            Exception: what `fail` was given.
        """
        while not self.is_paused:
            if self._error is not None:
                raise self._error
            if self._results:
                return self._results.popleft()
            if self.inputs and not self.is_stepping:
                return self.inputs.popleft()
            await self._change()
        raise PausedError

    async def _change(self) -> None:
        self._changed = trio.Event()
        self._is_awaited = True
        try:
            await self._changed.wait()
        finally:
            self._is_awaited = False

    async def until_landed(self) -> None:
        """Wait for a step that is being computed without the task."""
        while self.is_stepping:
            await self._change()

    async def until_paused(self) -> None:
        """Wait for the leg's end."""
        await self._paused.wait()

    @contextmanager
    def pausable(self) -> Iterator[None]:
        """What is waited for in here is given up when the leg is paused: PausedError is raised then."""
        with trio.CancelScope() as self._wait:
            if self.is_paused:
                self._wait.cancel()
            yield
        if self._wait.cancelled_caught:
            raise PausedError
