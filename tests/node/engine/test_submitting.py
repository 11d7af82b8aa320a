"""Steps without a task that waits for them, and what each pass is run in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import outcome
import trio

from node.engine.device import open_device_thread
from tests.node.engine.test_device import Adder, Gate, OddError, settle, until


async def test_results_are_told_on_the_event_loop_and_steps_share_passes_with_others() -> None:
    adder, gate = Adder(), Gate()
    told: list[tuple[int, outcome.Outcome[int], int]] = []

    def tell(number: int, result: outcome.Outcome[int]) -> None:
        told.append((number, result, threading.get_ident()))

    async with open_device_thread() as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        for number in range(3):
            device.submit(adder, [number] * 2, 1, 0, lambda result, number=number: tell(number, result))  # type: ignore[misc]
        nursery.start_soon(device.step, adder, [9], 1)
        await settle()
        gate.go_on.set()
    me = threading.get_ident()
    assert told == [(number, outcome.Value(2 * number), me) for number in range(3)]
    assert [sorted(steps) for steps in adder.passes] == [[[0, 0], [1, 1], [2, 2], [9]]]


async def test_a_step_that_is_given_up_is_not_computed_and_its_end_not_told() -> None:
    adder, gate, told = Adder(), Gate(), list[outcome.Outcome[int]]()
    async with open_device_thread() as device, trio.open_nursery() as nursery:
        nursery.start_soon(device.run, gate)
        await gate.until_entered()
        give_up = device.submit(adder, [1], 1, 0, told.append)
        device.submit(adder, [2], 1, 0, told.append)
        await settle()
        give_up()
        gate.go_on.set()
        await until(lambda: bool(told))
    assert adder.passes == [[[2]]]
    assert told == [outcome.Value(2)]


async def test_a_runner_with_a_bug_is_told_of_as_any_other_end() -> None:
    told: list[outcome.Outcome[int]] = []
    async with open_device_thread() as device:
        device.submit(Adder(), [None], 1, 0, told.append)  # type: ignore[list-item]
        await until(lambda: bool(told))
    assert isinstance(told[0], outcome.Error)
    assert isinstance(told[0].error, OddError)


async def test_each_pass_has_a_turn_of_its_own_on_the_devices_thread() -> None:
    turns: list[int] = []

    @contextmanager
    def turn() -> Iterator[None]:
        turns.append(threading.get_ident())
        yield
        turns.append(-1)

    async with open_device_thread(turn) as device:
        ident = await device.run(threading.get_ident)
        for number in range(2):
            assert await device.step(Adder(), [number], 1) == number
        await device.run(lambda: None)
    assert turns == [ident, -1] * 2
