"""Jobs over real overlays with a tiny model: the answers are the unsplit model's, and however a job ends, its room is
free again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import outcome
import pytest
import trio

from azu.channel import Channel
from azu.errors import CapacityError
from azu.models.memory import MAX_JOBS
from azu.tickets import sign_ticket
from azu.wire.messages import (
    JOB,
    JOB_PROTOCOL,
    RING,
    RING_PROTOCOL,
    End,
    Failed,
    Hello,
    Open,
    Ping,
    Prompt,
    ReceiptReply,
    Refused,
    Token,
)
from azu.wire.tensors import WeightFormat
from azu.wire.tokens import pack_tokens
from node.engine.stage import Step
from node.jobs import Jobs
from tests.node.real_stages import (
    KV_TOKENS,
    LIMIT,
    Coordinator,
    TinyModel,
    identity,
    next_of,
    peer,
    prompt_of,
    real_ring,
    real_stage,
    tiny_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_the_answer_is_the_unsplit_models(model: TinyModel, count: int) -> None:
    async with real_ring(model, count) as coordinator:
        for length in (1, 7, 300):
            prompt = prompt_of(length)
            end = await coordinator.answer(coordinator.ticket(length, 12), prompt)
            assert (end.tokens, end.finish, end.failures) == (model.greedy(prompt, 12), "length", [])
            assert [end.receipts[index].tokens for index in range(count)] == [length + 11] * count
            for stage in coordinator.stages:
                stage.assert_idle()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
async def test_integer_weights(model: TinyModel, dtype: WeightFormat) -> None:
    prompt = prompt_of(30)
    answers = []
    for count in (1, 3):
        async with real_ring(replace(model, dtype=dtype), count) as coordinator:
            end = await coordinator.answer(coordinator.ticket(30, 12, dtype=dtype), prompt)
            assert (end.finish, end.failures, sorted(end.receipts)) == ("length", [], list(range(count)))
            answers.append(end.tokens)
            for other in sorted({"float32", "bfloat16", "int8", "int4"} - {dtype}):
                async with coordinator.opened(coordinator.ticket(30, dtype=other)) as channel:
                    assert (await next_of(channel, Refused)).code == "wrong_dtype"
    assert answers[0] == answers[1]


async def test_a_stop_token_ends_the_answer(model: TinyModel) -> None:
    prompt = prompt_of(9)
    expected = model.greedy(prompt, 6)
    stop = expected[3]
    async with real_ring(model, 2) as coordinator:
        end = await coordinator.answer(coordinator.ticket(9, 6, stop_tokens=(stop,)), prompt)
        assert (end.tokens, end.finish) == (expected[: expected.index(stop) + 1], "stop")


async def test_a_prompt_of_more_chunks_than_the_window(model: TinyModel) -> None:
    prompt = prompt_of(2_600)  # 11 chunks
    async with real_ring(model, 3) as coordinator:
        end = await coordinator.answer(coordinator.ticket(2_600, 3), prompt)
        assert (end.tokens, end.failures) == (model.greedy(prompt, 3), [])


async def test_the_end_is_answered_with_a_receipt_when_the_room_is_free(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator, coordinator.opened(coordinator.ticket(4, 2_000)) as channel:
        await channel.send(Prompt(), pack_tokens(prompt_of(4)))
        for _ in range(5):
            await next_of(channel, Token)
        await channel.send(End())
        while not isinstance((await channel.receive() or (None,))[0], ReceiptReply):
            pass
        coordinator.stages[0].assert_idle()


async def test_a_neighbour_that_dies_is_named(model: TinyModel) -> None:
    async with real_ring(model, 2) as coordinator:
        async with real_stage(model, 3, 2, 4) as lost:
            first = coordinator.stages[0]
            await coordinator.overlay.connect(lost.peer_id, lost.overlay.addrs)
            await first.overlay.connect(lost.peer_id, lost.overlay.addrs)
            await lost.overlay.connect(first.peer_id, first.overlay.addrs)
            chain = Coordinator(coordinator.identity, coordinator.overlay, [first, lost], coordinator.manifest)
            ticket = chain.ticket(5, 3_000)
            async with chain.opened(ticket, 0) as to_first, chain.opened(ticket, 1) as to_lost:
                await to_first.send(Prompt(), pack_tokens(prompt_of(5)))
                await next_of(to_lost, Token)
                await lost.overlay.disconnect(first.peer_id)
                assert (await next_of(to_first, Failed)).peer_id == lost.peer_id
        await first.until_idle()


async def test_a_job_lives_on_when_strangers_knock(model: TinyModel) -> None:
    async with real_ring(model, 2) as coordinator, peer(50) as stranger:
        first, last = coordinator.stages
        ticket = coordinator.ticket(5, 3_000)
        async with coordinator.opened(ticket, 0) as channel, coordinator.opened(ticket, 1) as tokens:
            await channel.send(Prompt(), pack_tokens(prompt_of(5)))
            await next_of(tokens, Token)
            # The third is the right neighbour, a second time.
            for knocking, stage in ((stranger, 1), (stranger, 0), (last.overlay, 1), (last.overlay, 0)):
                async with await knocking.open_stream(first.peer_id, RING_PROTOCOL, addrs=first.overlay.addrs) as ring:
                    await Channel(ring, RING).send(Hello(job_id=ticket.job_id, epoch=0, stage=stage))
                    assert await ring.receive_some() == b""
            violations = first.overlay.statistics().violations
            assert violations == {stranger.peer_id: 2, last.peer_id: 2}
            for _ in range(5):
                assert await next_of(tokens, Token) is not None
            assert first.jobs.count == last.jobs.count == 1
        for stage in coordinator.stages:
            await stage.until_idle()


async def test_a_ring_stream_without_a_job_is_refused(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.jobs._TICKET_LAG_S", 0.1)
    async with real_ring(model, 1) as coordinator:
        stream = await coordinator.overlay.open_stream(coordinator.stages[0].peer_id, RING_PROTOCOL)
        async with stream:
            channel = Channel(stream, RING)
            await channel.send(Hello(job_id=os.urandom(16), epoch=0, stage=0))
            assert (await next_of(channel, Refused)).code == "unknown_job"


SHORTER = {"n_layers": 3, "stages": [{"peer_id": identity(1).peer_id, "start": 0, "end": 3}]}
LONGER = {
    "n_layers": 5,
    "stages": [
        {"peer_id": identity(1).peer_id, "start": 0, "end": 4},
        {"peer_id": identity(2).peer_id, "start": 4, "end": 5},
    ],
}


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("expired", {"expires_at": 1_000}),
        ("from_the_future", {"issued_at": 2**39}),
        ("not_loaded", {"manifest": "0" * 64}),
        ("wrong_range", SHORTER),
        ("wrong_range", LONGER),
        ("wrong_dtype", {"dtype": "float16"}),
        ("wrong_dtype", {"dtype": "int8"}),
        ("not_my_stage", {"stages": [{"peer_id": identity(7).peer_id, "start": 0, "end": 4}]}),
        ("wrong_signer", {"coordinator": identity(7).peer_id}),
        ("no_capacity", {"max_tokens": KV_TOKENS}),
        ("too_long", {"max_tokens": 2 * KV_TOKENS}),
    ],
)
async def test_refused_tickets(model: TinyModel, code: str, changes: dict[str, Any]) -> None:
    async with real_ring(model, 1) as coordinator:
        async with coordinator.opened(coordinator.ticket(4, **changes)) as channel:
            assert (await next_of(channel, Refused)).code == code
            assert await channel.receive() is None
        coordinator.stages[0].assert_idle()
        assert not coordinator.stages[0].overlay.statistics().violations


async def test_a_ticket_is_worth_one_job(model: TinyModel) -> None:
    prompt = prompt_of(4)
    async with real_ring(model, 1) as coordinator, peer(50) as thief:
        stage = coordinator.stages[0]
        ticket = coordinator.ticket(4, 2_000)
        async with coordinator.opened(ticket) as running:
            async with coordinator.opened(ticket) as again:
                assert (await next_of(again, Refused)).code == "duplicate_job"
            await running.send(Prompt(), pack_tokens(prompt))
            assert await next_of(running, Token) is not None
        await stage.until_idle()
        async with coordinator.opened(ticket) as again:
            assert (await next_of(again, Refused)).code == "duplicate_job"
        async with await thief.open_stream(stage.peer_id, JOB_PROTOCOL, addrs=stage.overlay.addrs) as stream:
            stolen = Channel(stream, JOB)
            await stolen.send(Open(), sign_ticket(coordinator.identity, coordinator.ticket(4)))
            assert (await next_of(stolen, Refused)).code == "wrong_signer"
        stage.assert_idle()


async def test_what_is_reserved_is_not_given_twice(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        stage = coordinator.stages[0]
        async with coordinator.opened(coordinator.ticket(KV_TOKENS - 10, 4)) as running:
            await running.send(Ping())
            while not stage.jobs.count:
                await trio.sleep(0.005)
            assert stage.jobs.kv.room == 0
            async with coordinator.opened(coordinator.ticket(4, 3)) as refused:
                assert (await next_of(refused, Refused)).code == "no_capacity"
        await stage.until_idle()
        end = await coordinator.answer(coordinator.ticket(4, 2), prompt_of(4))
        assert end.finish == "length"


async def test_no_more_jobs_at_once_than_memory_was_counted_for(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator, AsyncExitStack() as stack:
        stage = coordinator.stages[0]
        for _ in range(MAX_JOBS):
            await stack.enter_async_context(coordinator.opened(coordinator.ticket(4, 8)))
        while stage.jobs.count < MAX_JOBS:
            await trio.sleep(0.005)
        async with coordinator.opened(coordinator.ticket(4, 8)) as refused:
            assert (await next_of(refused, Refused)).code == "no_capacity"


@pytest.mark.parametrize("prompt", [[], [3, 4, 5], [3, 4, 5, 6, 7], [3, 4, 5, 64], [2**31, 4, 5, 6]])
async def test_a_prompt_that_is_not_the_tickets_ends_the_job(model: TinyModel, prompt: list[int]) -> None:
    async with real_ring(model, 1) as coordinator:
        stage = coordinator.stages[0]
        async with coordinator.opened(coordinator.ticket(4)) as channel:
            await channel.send(Prompt(), pack_tokens(prompt))
            assert await next_of(channel, Token) is None
        await stage.until_idle()
        assert stage.overlay.statistics().violations == {coordinator.identity.peer_id: 1}


@pytest.mark.parametrize("second", [Prompt(), Open(), Token(index=0, token=1)])
async def test_what_has_no_place_in_a_running_job_ends_it(model: TinyModel, second: Any) -> None:
    async with real_ring(model, 1) as coordinator:
        stage = coordinator.stages[0]
        async with coordinator.opened(coordinator.ticket(4, 2_000)) as channel:
            await channel.send(Prompt(), pack_tokens(prompt_of(4)))
            await next_of(channel, Token)
            await channel.send(second)
            while await channel.receive() is not None:
                pass
        await stage.until_idle()


async def test_an_expired_job_says_so(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        ticket = coordinator.ticket(4, expires_at=int(time.time()) + 3)
        async with coordinator.opened(ticket) as channel:
            assert (await next_of(channel, Failed)).code == "job_expired"
            coordinator.stages[0].assert_idle()
            assert await channel.receive() is None


async def test_a_silent_coordinator_loses_its_job(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.line.SILENCE_S", 0.2)
    async with real_ring(model, 2) as coordinator, coordinator.opened(coordinator.ticket(4)) as channel:
        while await channel.receive() is not None:
            pass
        coordinator.stages[0].assert_idle()


async def test_an_error_of_the_device_is_told_once_and_ends_with_the_job(model: TinyModel) -> None:
    def out_of_memory(steps: Sequence[Step]) -> list[outcome.Outcome[Any]]:
        return [outcome.Error(CapacityError("the device is out of memory", code="device_out_of_memory"))] * len(steps)

    async with real_ring(model, 2) as coordinator:
        second = coordinator.stages[1]
        assert second.jobs.loaded is not None
        second.jobs.loaded.stage.run_steps = out_of_memory  # type: ignore[method-assign, assignment]
        end = await coordinator.answer(coordinator.ticket(600), prompt_of(600))
        assert [(each.peer_id, each.code) for each in end.failures] == [(second.peer_id, "device_out_of_memory")]
        assert end.tokens == []
        assert sorted(end.receipts) == [0, 1]
        for stage in coordinator.stages:
            stage.assert_idle()


async def test_a_bug_in_the_device_ends_its_job_alone(model: TinyModel) -> None:
    """Also where another job is in the same pass."""
    async with real_ring(model, 1) as coordinator:
        stage = coordinator.stages[0]
        assert stage.jobs.loaded is not None
        inner = stage.jobs.loaded.stage._stage
        forward, forward_pack = inner.forward, inner.forward_pack

        def broken(inputs: Any, *others: Any) -> Any:
            if len(inputs) == 13:
                raise ZeroDivisionError("a bug")
            return forward(inputs, *others)

        def broken_pack(parts: Sequence[Any]) -> Any:
            result = forward_pack(parts)
            if any(len(part.inputs) == 13 for part in parts):
                raise ZeroDivisionError("a bug")
            return result

        inner.forward, inner.forward_pack = broken, broken_pack  # type: ignore[method-assign]
        ends: list[Any] = []

        async def good() -> None:
            ends.append(await coordinator.answer(coordinator.ticket(5, 200), prompt_of(5)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(good)
            for _ in range(3):
                async with coordinator.opened(coordinator.ticket(13)) as channel:
                    await channel.send(Prompt(), pack_tokens(prompt_of(13)))
                    assert (await next_of(channel, Failed)).code == "stage_failed"
        await stage.until_idle()
        assert ends[0].tokens == model.greedy(prompt_of(5), 200)


async def test_a_coordinator_that_does_not_read_stalls_its_own_job_alone(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        stage = coordinator.stages[0]
        async with coordinator.opened(coordinator.ticket(4, 3_000)) as deaf:
            await deaf.send(Prompt(), pack_tokens(prompt_of(4)))
            for number in range(3):
                prompt = prompt_of(20, number)
                end = await coordinator.answer(coordinator.ticket(20, 30), prompt)
                assert end.tokens == model.greedy(prompt, 30)
            assert stage.jobs.count == 1
        await stage.until_idle()


async def test_a_worker_that_stops_leaves_no_job_behind(model: TinyModel) -> None:
    jobs: list[Jobs] = []
    with trio.fail_after(LIMIT):
        async with peer(99) as me:
            async with real_stage(model, 1, 0, 4) as stage:
                await me.connect(stage.peer_id, stage.overlay.addrs)
                coordinator = Coordinator(identity(99), me, [stage], model.manifest.digest)
                async with await me.open_stream(stage.peer_id, JOB_PROTOCOL) as stream:
                    channel = Channel(stream, JOB)
                    await channel.send(Open(), sign_ticket(coordinator.identity, coordinator.ticket(4, 3_000)))
                    await channel.send(Prompt(), pack_tokens(prompt_of(4)))
                    await next_of(channel, Token)
                    jobs.append(stage.jobs)
                    assert stage.jobs.count == 1
                started = trio.current_time()
            assert jobs[0].count == 0
            assert trio.current_time() - started < 10
