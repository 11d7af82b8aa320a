"""The device thread: all torch work of one device runs on one thread, so that the event loop never waits for it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import outcome
import trio

__all__ = ["DeviceThread", "open_device_thread"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Work:
    call: Callable[[], Any]
    task: trio.lowlevel.Task
    abandoned: bool = False


class DeviceThread:
    """Runs calls in the order in which they were submitted. Made by `open_device_thread`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._trio = trio.lowlevel.current_trio_token()
        # A daemon: a call that hangs in a driver must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, name="azu-device", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` on the device thread and return its result or raise its error.

        Safe to cancel: a call that has not begun is skipped, the result of one that has is dropped.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        work = _Work(call, trio.lowlevel.current_task())

        def abort(_: object) -> trio.lowlevel.Abort:
            work.abandoned = True
            return trio.lowlevel.Abort.SUCCEEDED

        self._queue.put(work)
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    @property
    def pending(self) -> int:
        """Calls that wait for the thread."""
        return self._queue.qsize()

    def close(self) -> None:
        """Let the thread end after the call that it is in."""
        self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if not work.abandoned:
                result = outcome.capture(work.call)
                try:
                    self._trio.run_sync_soon(_deliver, work, result)
                except trio.RunFinishedError:
                    return
                del result
            # Held over the next wait, these would keep a freed job's cache alive.
            del work


def _deliver(work: _Work, result: outcome.Outcome[Any]) -> None:
    if not work.abandoned:
        trio.lowlevel.reschedule(work.task, result)
    elif isinstance(result, outcome.Error):
        logger.debug("a call whose caller was cancelled failed: %r", result.error)


@asynccontextmanager
async def open_device_thread() -> AsyncIterator[DeviceThread]:
    """A running device thread; it ends with the context."""
    device = DeviceThread()
    try:
        yield device
    finally:
        device.close()
