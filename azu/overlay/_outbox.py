"""Where the streams of one connection leave their frames: what waits at the same time leaves with one socket call.

A stage passes a whole batch on at once, each job's states on a stream of its own. Sent one by one they would cost a
call and a wake-up of the other end each, and the other end would begin to compute with the first of them. So a write
waits for the end of its turn of the event loop, unless the last ones have shown that nobody else writes then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.io.exceptions import ConnectionClosedError

__all__ = ["Outbox"]

# A decoded token's states and every control frame: these overtake prompts and files, and so does an urgent stream.
SMALL_BYTES = 32 * 1024
LARGE_BYTES = 256 * 1024  # of the others that leave with one call; one at least
ALONE = 8  # writes in a row that met no other, after which none waits for one any more


class _Entry:
    """Frames that belong together, and the task that waits for them to leave, or to be the next to leave."""

    __slots__ = ("error", "frames", "has_left", "is_small", "size", "stream", "task")

    def __init__(self, frames: Sequence[bytes], *, is_urgent: bool) -> None:
        self.frames = frames
        self.stream = frames[0][4:8]  # its id, in a Yamux header
        self.size = sum(map(len, frames))
        self.is_small = is_urgent or self.size <= SMALL_BYTES
        self.task: trio.lowlevel.Task | None = None
        self.has_left = False
        self.error: BaseException | None = None

    def wake(self) -> None:
        """Let its task go on, if it waits."""
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None


class Outbox:
    """Orders writers: small frames overtake large ones, those of their own stream excepted.

    Args:
        send: writes Yamux frames whole or closes the connection; it is never cancelled inside.
    """

    def __init__(self, send: Callable[[Sequence[bytes]], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: deque[_Entry] = deque()
        self._is_sending = False
        self._alone = 0  # writes since two last met

    async def write(self, frames: Sequence[bytes], *, is_urgent: bool = False) -> None:
        """Write frames whole. Cancelling is safe: they leave whole, or not at all, and small ones do leave, since they
        go with the next call.

        Raises:
            ConnectionClosedError: the connection ended; and whatever `send` raises.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        entry = _Entry(frames, is_urgent=is_urgent)
        self._waiting.append(entry)
        if self._is_sending:
            self._alone = 0
            await self._wait(entry)
            if entry.has_left:
                if entry.error is not None:
                    raise ConnectionClosedError(f"the connection ended: {entry.error}") from entry.error
                return
        else:
            self._is_sending = True
            self._alone += 1
            if self._alone <= ALONE:  # whoever else writes in this turn of the event loop comes along
                await trio.lowlevel.cancel_shielded_checkpoint()
        await self._flush()

    async def _wait(self, entry: _Entry) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            if entry not in self._waiting or self._is_next(entry):
                return trio.lowlevel.Abort.FAILED
            entry.task = None
            self._waiting.remove(entry)
            return trio.lowlevel.Abort.SUCCEEDED

        entry.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _is_next(self, entry: _Entry) -> bool:
        """Whether it will leave with the next call in any case."""
        return entry.is_small and not any(each.stream == entry.stream and not each.is_small for each in self._waiting)

    async def _flush(self) -> None:
        taken = self._take()
        try:
            await self._send([frame for entry in taken for frame in entry.frames])
        except BaseException as error:
            for entry in taken:
                entry.error = error
            raise
        finally:
            for entry in taken:
                entry.has_left = True
                entry.wake()
            self._pass_on()

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting[0].wake()  # it sends the next ones, its own among them
        else:
            self._is_sending = False

    def _take(self) -> list[_Entry]:
        """All small entries, then of the others the oldest, and as many more as fit."""
        small: list[_Entry] = []
        large: list[_Entry] = []
        left: deque[_Entry] = deque()
        size = 0
        held: set[bytes] = set()  # streams that have something large waiting
        for entry in self._waiting:
            if entry.is_small and entry.stream not in held:
                small.append(entry)
                continue
            held.add(entry.stream)
            if not large or (not left and size + entry.size <= LARGE_BYTES):
                size += entry.size
                large.append(entry)
            else:
                left.append(entry)
        self._waiting = left
        return small + large
