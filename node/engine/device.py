"""The device thread: all torch work of one device runs on one thread, so that the event loop never waits for it.

Steps of jobs that wait at the same time are computed in one pass (`scheduler`). The thread picks them itself, as soon
as the pass before is done, so that nothing on the event loop stands between two passes. Steps that come in the same
turn of the event loop, as those of a pass of the stage before do, are handed to it together. The first stage waits
for more of them, as `gathering` says.

A runner is a stage or a part of one: passes of different runners take turns.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import outcome
import trio

from node.engine.gathering import Gathering
from node.engine.instruments import Passes
from node.engine.scheduler import StepQueue

__all__ = ["DeviceThread", "Runner", "open_device_thread"]

T = TypeVar("T")
Turn = Callable[[], AbstractContextManager[None]]
# The group of all steps that are computed alone; where steps can share a pass, each runner's are a group.
_ALONE = object()
logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What computes steps. Called on the device thread only."""

    @property
    def can_pack(self) -> bool:
        """Whether several jobs' steps can share a pass."""

    @property
    def is_first(self) -> bool:
        """Whether it is the ring's first stage, where tokens come back to."""

    @property
    def n_layers(self) -> int:
        """The layers that a step goes through."""

    def run_steps(self, steps: Sequence[Any]) -> list[outcome.Outcome[Any]]:
        """Compute steps of different jobs in one pass: for each its result, or its error."""


@dataclass(slots=True, eq=False)
class _Work:
    """A call, or (where there is a `runner`) a step of a job."""

    call: Callable[[], Any] | None
    done: Callable[[outcome.Outcome[Any]], None]  # called on the event loop with what came of it
    runner: Runner | None = None
    step: Any = None
    rows: int = 0
    returns_to: int = 0  # its job, where a token of it will come
    since: float = field(default_factory=time.perf_counter)
    abandoned: bool = False

    def abandon(self) -> None:
        """Skip it, if it has not begun, or drop its result."""
        self.abandoned = True
        self.step = None  # its job's cache is free at once, not when its turn comes


class DeviceThread(trio.abc.Instrument):
    """Runs calls in the order in which they were submitted, and steps in passes. Made by `open_device_thread`.

    It is an instrument of the event loop only to be told where a turn ends: a callback would cost another turn.
    """

    def __init__(self, turn: Turn = nullcontext) -> None:
        self.passes = Passes()
        self._turn = turn
        # Calls, steps, and jobs that ended.
        self._queue: queue.SimpleQueue[_Work | list[_Work] | int | None] = queue.SimpleQueue()
        self._arriving: list[_Work] = []  # steps of this turn of the event loop
        self._steps: StepQueue[object, _Work] = StepQueue(lambda work: not work.abandoned)
        # Of runners that are first stages, while somebody holds them.
        self._gatherings: weakref.WeakKeyDictionary[Runner, Gathering] = weakref.WeakKeyDictionary()
        self._trio = trio.lowlevel.current_trio_token()
        # A daemon: a call that hangs in a driver must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, name="azu-device", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` on the device thread and return its result or raise its error.

        Safe to cancel: a call that has not begun is skipped, the result of one that has is dropped.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        work = _Work(call, _waking(trio.lowlevel.current_task()))
        self._queue.put(work)
        result: T = await _wait(work.abandon)
        return result

    async def step(self, runner: Runner, step: Any, rows: int, returns_to: int = 0) -> Any:
        """Compute a step of `rows` rows, together with those of other jobs that wait; as `run` otherwise.

        A job has one step at a time, and one runner.

        Args:
            returns_to: a number of the job's own where a token of it will come after this step; `ended` takes it back.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        return await _wait(self.submit(runner, step, rows, returns_to, _waking(trio.lowlevel.current_task())))

    def submit(
        self, runner: Runner, step: Any, rows: int, returns_to: int, done: Callable[[outcome.Outcome[Any]], None]
    ) -> Callable[[], None]:
        """As `step`, without a task that waits for it: `done` is called on the event loop, and must not raise.

        Returns:
            What gives the step up: it is skipped, or its result dropped.
        """
        work = _Work(None, done, runner, step, rows, returns_to)
        self._arriving.append(work)
        return work.abandon

    def ended(self, job: int) -> None:
        """No token of this job will come any more."""
        self._queue.put(job)

    def before_io_wait(self, timeout: float) -> None:
        """Hand over the steps that came in the turn that ends."""
        if self._arriving:
            self._queue.put(self._arriving)
            self._arriving = []

    @property
    def pending(self) -> int:
        """Calls and steps that wait for the thread."""
        return self._queue.qsize() + len(self._arriving) + len(self._steps)

    def close(self) -> None:
        """Let the thread end after what it is in."""
        self._queue.put(None)

    def _work(self) -> None:
        try:
            while self._work_on():
                pass
        except trio.RunFinishedError:
            return

    def _work_on(self) -> bool:
        """Run calls, and then a pass; False once closed. Nothing of it is held over the next one's wait."""
        group = self._next_group()
        if group is not None:
            self._run_pass(group)
        return group is not None

    def _next_group(self) -> Any:
        """Run the calls that wait, and let steps join the queue, until the next pass is due. Returns whose it is; None
        once closed.
        """
        while True:
            waiting = ((self._patience(group), group) for group in self._steps.groups)
            wait, group = min(waiting, key=_first, default=(None, None))
            try:
                work = self._queue.get(timeout=wait)
            except queue.Empty:
                if not wait:
                    return group
                continue
            if work is None:
                return None
            if isinstance(work, list):
                self._add(work)
            elif isinstance(work, int):
                for gathering in self._gatherings.values():
                    gathering.forget(work)
            elif work.call is not None and not work.abandoned:
                result = outcome.capture(work.call)
                self._trio.run_sync_soon(_deliver, [(work, result)])
                del result
            del work  # held over the next wait, it would keep a freed job's cache alive

    def _add(self, works: list[_Work]) -> None:
        for work in works:
            runner: Any = work.runner  # a step has one
            self._steps.add(runner if runner.can_pack else _ALONE, work, work.rows)
            if runner.is_first and work.rows == 1 and work.returns_to:
                self._gathering(runner).came(work.returns_to, work.since)

    def _gathering(self, runner: Runner) -> Gathering:
        found = self._gatherings.get(runner)
        if found is None:
            found = self._gatherings[runner] = Gathering()
        return found

    def _patience(self, group: Any) -> float:
        """Seconds for which the pass of a group, a runner or `_ALONE`, may wait for more steps."""
        if group is _ALONE or not group.is_first or self._steps.has_chunks(group):
            return 0.0
        return self._gathering(group).patience(self._steps.oldest(group).since, time.perf_counter())

    def _run_pass(self, group: Any) -> None:
        if group is _ALONE:
            works = self._steps.next_alone(group)
        else:
            works = self._steps.next_pass(group, self._gathering(group).size if group.is_first else None)
        steps = [(work, work.step) for work in works]
        steps = [(work, step) for work, step in steps if step is not None]  # cancelled just now
        if not steps:
            return
        runner: Any = steps[0][0].runner
        started = time.perf_counter()
        with self._turn():
            done = outcome.capture(runner.run_steps, [step for _, step in steps])
        results = done.value if isinstance(done, outcome.Value) else [done] * len(steps)
        rows, ended = [work.rows for work, _ in steps], time.perf_counter()
        self.passes.note(started, ended, runner.n_layers, rows, [work.since for work, _ in steps])
        if runner.is_first:
            jobs = [work.returns_to for work, _ in steps if work.returns_to and not work.abandoned]
            self._gathering(runner).left(jobs, sum(each for each in rows if each > 1), ended)
        self._trio.run_sync_soon(_deliver, [(work, result) for (work, _), result in zip(steps, results, strict=True)])


async def _wait(abandon: Callable[[], None]) -> Any:
    def abort(_: object) -> trio.lowlevel.Abort:
        abandon()
        return trio.lowlevel.Abort.SUCCEEDED

    return await trio.lowlevel.wait_task_rescheduled(abort)


def _waking(task: trio.lowlevel.Task) -> Callable[[outcome.Outcome[Any]], None]:
    return partial(trio.lowlevel.reschedule, task)


def _first(pair: tuple[float, object]) -> float:
    return pair[0]


def _deliver(done: list[tuple[_Work, outcome.Outcome[Any]]]) -> None:
    for work, result in done:
        if not work.abandoned:
            work.done(result)
        elif isinstance(result, outcome.Error):
            logger.debug("a call whose caller was cancelled failed: %r", result.error)


@asynccontextmanager
async def open_device_thread(turn: Turn = nullcontext) -> AsyncIterator[DeviceThread]:
    """A running device thread; it ends with the context.

    Args:
        turn: makes what each pass is run in.
    """
    device = DeviceThread(turn)
    trio.lowlevel.add_instrument(device)
    try:
        yield device
    finally:
        trio.lowlevel.remove_instrument(device)
        device.close()
