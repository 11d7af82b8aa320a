"""Others get their turns while something long is computed."""

from __future__ import annotations

import pytest
import trio

from azu.planning import place, place_in_steps
from azu.planning.steps import Steps
from azu.slices import in_slices
from benchmarks.machines import large_model, machines


async def test_others_have_their_turns_meanwhile() -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    def until_others_had_some() -> Steps[str]:
        while turns < 5:
            yield
        return "done"

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            assert await in_slices(until_others_had_some()) == "done"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("count", "least"), [(12, 500), (40, 500), (400, 400)])
async def test_a_plan_is_made_in_small_steps(count: int, least: int) -> None:
    shape, workers = large_model(32), machines(count, seed=1)
    assert sum(1 for _ in place_in_steps(shape, workers)) >= least
    assert await in_slices(place_in_steps(shape, workers)) == place(shape, workers)
