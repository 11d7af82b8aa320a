"""Jobs wait here for room in the workers' KV caches: the fair queue of `planning.admission`, with a clock and waiters.

Who grants room is told of every change: a job comes, one ends, and each second, since records change too. Room is taken
for a job in the same turn of the event loop in which it is granted, so that no two get the same. A waiter that is
cancelled after it was granted room gives it back, and the next in turn is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from azu.errors import AzuError, CapacityError
from azu.planning.snapshot import Placement
from coordinator.generation import GenerationRequest
from coordinator.planning.admission import FairQueue, Waiting

__all__ = ["Admission", "Grant"]

_TICK_S = 1.0
_MAX_WAITING = 256


@dataclass(eq=False, slots=True)
class Grant:
    """Room for a job, held until it is released: `tokens` positions to begin with at each worker of the chain."""

    chain: tuple[Placement, ...]
    dtype: str
    tokens: int
    manifest: str = ""


@dataclass(eq=False, slots=True)
class _Asking:
    """A request that waits. `answer` comes once: room, or why there will be none."""

    request: GenerationRequest
    answer: Grant | AzuError | None = None
    answered: trio.Event = field(default_factory=trio.Event)

    @property
    def tokens(self) -> int:
        """Positions that it may come to need."""
        return len(self.request.prompt) + self.request.max_tokens

    def give(self, answer: Grant | AzuError) -> None:
        self.answer = answer
        self.answered.set()


class Admission:
    """Lets jobs in.

    Args:
        find: room for a request now, taken for it until `release`; None where there is none.
        refuse: the error for a request that never fits as things are; None where it is worth to wait.
        free: takes the room back.
    """

    def __init__(
        self,
        find: Callable[[GenerationRequest], Grant | None],
        refuse: Callable[[GenerationRequest], AzuError | None],
        free: Callable[[Grant], None],
    ) -> None:
        self._find = find
        self._refuse = refuse
        self._free = free
        self._queue = FairQueue[_Asking](_MAX_WAITING)
        self._asking: dict[_Asking, Waiting[_Asking]] = {}
        self._too_many: dict[str, int] = {}  # by model, a prompt of so many found no room since something changed
        self._next_tick = 0.0

    async def admit(self, request: GenerationRequest, deadline: float) -> Grant:
        """Room for the job, waited for until `deadline`; to be released.

        Raises:
            CapacityError: there is none, with an estimate of when to try again.
        """
        asking = _Asking(request)
        digest = request.model.manifest.digest
        place, dropped = self._queue.submit(asking, request.account, digest, asking.tokens, trio.current_time())
        if dropped is not None:
            del self._asking[dropped.item]
            dropped.item.give(self._full(dropped.account))
        if place is None:
            raise self._full(request.account)
        self._asking[asking] = place
        try:
            self._serve()
            self._check(asking)
            while asking.answer is None and trio.current_time() < deadline:
                with trio.move_on_after(min(_TICK_S, deadline - trio.current_time())):
                    await asking.answered.wait()
                self._tick()
        except BaseException:
            if isinstance(asking.answer, Grant):
                self.release(asking.answer)
            raise
        finally:
            if self._asking.pop(asking, None) is not None:
                self._queue.cancel(place)
        if isinstance(asking.answer, Grant):
            return asking.answer
        raise asking.answer or self._full(request.account)

    def release(self, grant: Grant) -> None:
        """Give room back, and let in who waits for it."""
        self._free(grant)
        self._too_many.clear()
        self._serve()

    def _tick(self) -> None:
        """Once a second, whoever waits has everybody looked at again."""
        if trio.current_time() < self._next_tick:
            return
        self._next_tick = trio.current_time() + _TICK_S
        self._too_many.clear()
        self._serve()
        worth_it: dict[str, int] = {}  # by model, so many positions would fit if no job were running
        for asking in sorted(self._asking, key=lambda each: -each.tokens):
            digest = asking.request.model.manifest.digest
            if asking.tokens > worth_it.get(digest, 0):
                self._check(asking)
                if asking.answer is None:
                    worth_it[digest] = asking.tokens

    def _serve(self) -> None:
        """Let in everybody for whom there is room, in turn."""
        while (taken := self._queue.take(self._room_for, trio.current_time())) is not None:
            waiting, grant = taken
            del self._asking[waiting.item]
            waiting.item.give(grant)

    def _room_for(self, asking: _Asking) -> Grant | None:
        digest = asking.request.model.manifest.digest
        first = len(asking.request.prompt)
        if first >= self._too_many.get(digest, first + 1):
            return None
        grant = self._find(asking.request)
        if grant is None:
            self._too_many[digest] = first
        return grant

    def _check(self, asking: _Asking) -> None:
        """Turn a request away that would wait in vain."""
        if asking.answer is None and (error := self._refuse(asking.request)) is not None:
            self._queue.cancel(self._asking.pop(asking))
            asking.give(error)

    def _full(self, account: str) -> CapacityError:
        return CapacityError(
            "all workers' KV caches are full",
            remedy="Try again in a moment, send a smaller max_tokens, or let more workers join",
            retry_after_s=self._queue.retry_after_s(account),
        )
