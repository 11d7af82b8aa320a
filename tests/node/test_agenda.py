"""What a leg's task is told to do: results first, inputs when no step is under way, and an end between two steps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from azu.errors import NetworkError
from azu.wire.messages import Token
from node.agenda import Agenda, Input, PausedError

INPUT = Input(5, 1, True, token=3)
TOKEN = Token(index=0, token=3)
LIMIT = 30.0


async def test_results_come_first_and_inputs_wait_for_the_step_under_way() -> None:
    agenda = Agenda()
    agenda.put(INPUT)
    agenda.is_stepping = True
    agenda.pass_on(TOKEN)
    with trio.fail_after(LIMIT):
        assert await agenda.next() is TOKEN
        with trio.move_on_after(0.05) as patience:
            await agenda.next()
        assert patience.cancelled_caught
        agenda.landed()
        assert await agenda.next() is INPUT


async def test_a_step_needs_no_task_only_while_that_waits_and_has_nothing_to_do() -> None:
    agenda = Agenda()
    assert not agenda.is_clear
    seen: list[object] = []

    async def work() -> None:
        while True:
            seen.append(await agenda.next())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        assert agenda.is_clear
        agenda.put(INPUT)
        assert not agenda.is_clear, "it has been woken"
        await trio.testing.wait_all_tasks_blocked()
        assert agenda.is_clear
        agenda.is_stepping = True
        assert not agenda.is_clear
        agenda.landed()
        assert agenda.is_clear
        agenda.pass_on(TOKEN)
        assert not agenda.is_clear
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert seen == [INPUT, TOKEN]


async def test_a_fault_is_raised_by_the_task_and_a_pause_ends_it_before_anything_else() -> None:
    agenda = Agenda()
    agenda.put(INPUT)
    agenda.fail(NetworkError("gone"))
    with pytest.raises(NetworkError):
        await agenda.next()
    agenda.pause()
    with pytest.raises(PausedError):
        await agenda.next()
    with pytest.raises(PausedError), agenda.pausable():
        await trio.sleep_forever()


async def test_the_end_waits_for_the_step_under_way() -> None:
    agenda = Agenda()
    agenda.is_stepping = True
    agenda.pause()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agenda.until_landed)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        agenda.landed()
        with trio.fail_after(LIMIT):
            await agenda.until_landed()
            await agenda.until_paused()
