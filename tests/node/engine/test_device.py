"""The device thread: order, errors, cancellation, and an event loop that goes on meanwhile."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import outcome
import pytest
import trio
import trio.lowlevel
import trio.testing

from node.engine.device import DeviceThread, open_device_thread
from tests.turns import counted_turns

LIMIT = 30.0  # seconds; only keeps a hung test from hanging the run


class Gate:
    """A call that says when it began and goes on when it may."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.finished = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.go_on.wait(LIMIT)
        self.finished.set()
        return "done"

    async def until_entered(self) -> None:
        await until(self.entered.is_set)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.001)


async def settle() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()


async def test_results_and_one_thread_of_its_own() -> None:
    async with open_device_thread() as device:
        assert await device.run(lambda: 6 * 7) == 42
        idents = {await device.run(threading.get_ident) for _ in range(3)}
    assert len(idents) == 1
    assert idents != {threading.get_ident()}


async def test_calls_run_one_at_a_time_in_the_order_in_which_they_came() -> None:
    order: list[str] = []
    running = 0

    def work(number: int) -> None:
        nonlocal running
        running += 1
        assert running == 1
        order.append(f"work {number}")
        running -= 1

    async with open_device_thread() as device, trio.open_nursery() as nursery:
        gate = Gate()
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        for number in range(20):
            nursery.start_soon(device.run, partial(work, number))
            await trio.testing.wait_all_tasks_blocked()
        assert device.pending == 20
        gate.go_on.set()
    assert order == [f"work {number}" for number in range(20)]


class OddError(BaseException):
    """Not an Exception: torch's extension modules have raised such ones."""


@pytest.mark.parametrize("kind", [ValueError, KeyError, StopIteration, OddError])
async def test_errors_reach_the_caller_and_the_thread_lives_on(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("it broke")

    async with open_device_thread() as device:
        raised: BaseException | None = None
        try:
            await device.run(fail)
        except BaseException as error:
            raised = error
        # Coroutines cannot let StopIteration pass: Python turns it into a RuntimeError.
        assert isinstance(raised, RuntimeError if kind is StopIteration else kind)
        assert await device.run(lambda: "alive") == "alive"


async def test_a_call_cancelled_before_it_began_is_skipped() -> None:
    ran: list[str] = []
    async with open_device_thread() as device, trio.open_nursery() as nursery:
        gate = Gate()
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(device.run, partial(ran.append, "cancelled"))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        nursery.start_soon(device.run, partial(ran.append, "kept"))
        gate.go_on.set()
        await until(lambda: bool(ran))
    assert ran == ["kept"]


async def test_a_call_in_an_already_cancelled_scope_is_never_submitted() -> None:
    async with open_device_thread() as device:
        with trio.CancelScope() as scope:
            scope.cancel()
            await device.run(lambda: pytest.fail("it ran"))
        assert scope.cancelled_caught
        assert device.pending == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_call_cancelled_while_it_runs_is_dropped_without_waiting_for_it(fails: bool) -> None:
    gate = Gate()

    def work() -> str:
        gate()
        if fails:
            raise ValueError("nobody waits for this")
        return "dropped"

    async with open_device_thread() as device:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.run, work)
                await gate.until_entered()
                scope.cancel()
        assert scope.cancelled_caught
        assert not gate.finished.is_set()  # the caller has gone on, the call has not
        gate.go_on.set()
        assert await device.run(lambda: "next") == "next"
        await settle()
    assert gate.finished.is_set()


async def test_the_event_loop_goes_on_while_the_device_works() -> None:
    gate = Gate()
    async with open_device_thread() as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        for _ in range(100):  # would not come back from the first one, if the loop were waiting for the gate
            await trio.lowlevel.checkpoint()
        assert not gate.finished.is_set()
        gate.go_on.set()


async def test_the_thread_ends_with_its_context() -> None:
    async with open_device_thread() as device:
        thread = device._thread
        assert thread.is_alive()
        assert thread.daemon
    await until(lambda: not thread.is_alive())


async def test_leaving_does_not_wait_for_a_call_that_hangs() -> None:
    gate = Gate()
    with trio.fail_after(LIMIT), trio.CancelScope() as scope:
        async with open_device_thread() as device, trio.open_nursery() as nursery:
            nursery.start_soon(device.run, gate)
            await gate.until_entered()
            scope.cancel()
    assert not gate.finished.is_set()
    gate.go_on.set()
    await until(lambda: not device._thread.is_alive())


def test_a_call_may_outlive_the_event_loop() -> None:
    gate = Gate()
    thread: threading.Thread | None = None

    async def main() -> None:
        nonlocal thread
        with trio.CancelScope() as scope:
            async with open_device_thread() as device, trio.open_nursery() as nursery:
                thread = device._thread
                nursery.start_soon(device.run, gate)
                await gate.until_entered()
                scope.cancel()

    trio.run(main)
    gate.go_on.set()
    assert thread is not None
    thread.join(LIMIT)
    assert not thread.is_alive()


class Cache:
    """Stands for a job's KV cache: it must be gone when the job is."""

    def touch(self) -> Cache:
        return self


async def _finished(device: DeviceThread, cache: Cache) -> None:
    await device.run(cache.touch)


async def _cancelled_before_it_began(device: DeviceThread, cache: Cache) -> None:
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(device.run, cache.touch)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        gate.go_on.set()


async def _failed(device: DeviceThread, cache: Cache) -> None:
    def fail() -> None:
        raise ValueError(repr(cache.touch()))

    with pytest.raises(ValueError, match="Cache"):
        await device.run(fail)


@pytest.mark.parametrize("use", [_finished, _cancelled_before_it_began, _failed])
async def test_an_idle_thread_holds_on_to_nothing(use: Callable[[DeviceThread, Cache], object]) -> None:
    async with open_device_thread() as device:
        cache = Cache()
        seen = weakref.ref(cache)
        await use(device, cache)  # type: ignore[misc]
        del cache

        def is_gone() -> bool:
            gc.collect()
            return seen() is None

        await until(is_gone)


# --- steps


class Adder:
    """Adds up each step's numbers; notes who went together."""

    def __init__(self, *, can_pack: bool = True, is_first: bool = False) -> None:
        self.can_pack = can_pack
        self.n_layers = 3
        self.is_first = is_first
        self.passes: list[list[list[int]]] = []

    def run_steps(self, steps: Sequence[list[int]]) -> list[outcome.Outcome[int]]:
        self.passes.append(list(steps))
        if any(None in step for step in steps):
            raise OddError("a runner with a bug")
        return [outcome.capture(sum, step) for step in steps]


@pytest.mark.parametrize("can_pack", [True, False])
async def test_steps_that_wait_go_together_where_they_can(can_pack: bool) -> None:
    adder, gate, sums = Adder(can_pack=can_pack), Gate(), dict[int, int]()

    async def add(number: int) -> None:
        sums[number] = await device.step(adder, [number] * 3, 1)

    async with open_device_thread() as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        for number in range(5):
            nursery.start_soon(add, number)
        scope = trio.CancelScope()
        nursery.start_soon(_cancelled_step, device, adder, scope)
        await settle()
        scope.cancel()
        await settle()
        gate.go_on.set()
    assert sums == {number: 3 * number for number in range(5)}
    assert [len(steps) for steps in adder.passes] == ([5] if can_pack else [1] * 5)
    counted = device.passes.statistics()
    assert (counted.passes, counted.steps, counted.tokens, counted.rows) == (len(adder.passes), 5, 5, 5)
    assert counted.token_layers == 5 * 3
    assert counted.largest == (5 if can_pack else 1)


async def test_a_step_takes_two_turns_of_the_event_loop() -> None:
    async with open_device_thread() as device:
        for _ in range(3):
            with counted_turns() as turns:  # one in which it is handed over, one in which its result comes
                assert await device.step(Adder(), [1, 2], 1) == 3
            assert turns.count == 2


async def test_the_first_stage_waits_for_tokens_that_are_away_and_not_for_jobs_that_ended() -> None:
    adder = Adder(is_first=True)
    async with open_device_thread() as device:

        async def step(job: int) -> None:
            await device.step(adder, [job], 1, job)

        async with trio.open_nursery() as nursery:
            for job in (1, 2, 3):
                nursery.start_soon(step, job)
        gathering = device._gathering(adder)
        gathering.groups, gathering._trip = 1, 1e9  # they may be away for long
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, 1)
            await settle()
            nursery.start_soon(step, 2)
            await settle()
            assert len(adder.passes) == 1
            device.ended(3)
    assert [sorted(steps) for steps in adder.passes] == [[[1], [2], [3]], [[1], [2]]]


async def test_runners_take_turns_and_nobody_waits_for_anothers_tokens() -> None:
    whole, part, odd = Adder(is_first=True), Adder(), Adder(can_pack=False)
    order: list[str] = []

    def note(name: str, runner: Adder) -> None:
        run_steps = runner.run_steps

        def noted(steps: Sequence[list[int]]) -> list[outcome.Outcome[int]]:
            order.append(f"{name}{len(steps)}")
            return run_steps(steps)

        runner.run_steps = noted  # type: ignore[method-assign]

    for name, runner in (("whole ", whole), ("part ", part), ("odd ", odd)):
        note(name, runner)
    async with open_device_thread() as device:
        for job in (1, 2):
            await device.step(whole, [job], 1, job)
        gathering = device._gathering(whole)
        gathering.groups, gathering._trip = 1, 1e9  # it waits for the second job's token
        order.clear()
        async with trio.open_nursery() as nursery:
            gate = Gate()
            nursery.start_soon(device.run, gate)
            await gate.until_entered()
            nursery.start_soon(device.step, whole, [1], 1, 1)
            for _ in range(2):
                for runner, rows in ((part, 1), (odd, 1), (part, 200), (part, 200)):
                    nursery.start_soon(device.step, runner, [rows], rows)
                    await trio.testing.wait_all_tasks_blocked()
            gate.go_on.set()
            await until(lambda: len(part.passes) == 4 and len(odd.passes) == 2)
            await settle()
            assert whole.passes == [[[1]], [[2]]]
            device.ended(2)
    assert order == ["part 3", "odd 1", "part 1", "odd 1", "part 1", "part 1", "whole 1"]


async def test_an_idle_thread_holds_no_runner() -> None:
    async with open_device_thread() as device:
        adder = Adder(is_first=True)
        seen = weakref.ref(adder)
        for _ in range(2):
            await device.step(adder, [1], 1, 1)
        device.ended(1)
        del adder

        def is_gone() -> bool:
            gc.collect()
            return seen() is None

        await until(is_gone)
        assert not device._gatherings


async def _cancelled_step(device: DeviceThread, adder: Adder, scope: trio.CancelScope) -> None:
    with scope:
        await device.step(adder, [1_000_000], 1)
        raise AssertionError("it was not cancelled")


async def test_a_step_that_fails_fails_alone_and_a_runner_that_does_fails_its_pass() -> None:
    adder: Any = Adder()
    async with open_device_thread() as device:
        with pytest.raises(TypeError):
            await device.step(adder, ["not a number"], 1)
        with pytest.raises(OddError):
            await device.step(adder, [None], 1)
        assert await device.step(adder, [1, 2], 1) == 3
