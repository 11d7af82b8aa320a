"""Jobs that may come to need more KV cache than there is: they share it, and all come to their end."""

from __future__ import annotations

import pytest
import trio

from azu.channel import Channel
from azu.tickets import JobTicket
from azu.wire.messages import End, Message, Prompt, ReceiptReply, Refused, Token, Waiting
from azu.wire.tokens import pack_tokens
from node.engine.blocks import BLOCK
from node.kv_room import KvRoom
from tests.node.real_stages import Coordinator, TinyModel, next_of, prompt_of, real_ring, tiny_model

PROMPT = prompt_of(4)
MOST = 4 * BLOCK  # positions that each job may come to need


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def ticket(coordinator: Coordinator, begun_at: int) -> JobTicket:
    return coordinator.ticket(len(PROMPT), MOST - len(PROMPT), begun_at=begun_at)


async def heard(channel: Channel, *kinds: type[Message]) -> Message:
    """The next message that is one of these."""
    while True:
        received = await channel.receive()
        assert received is not None
        if isinstance(received[0], kinds):
            return received[0]


async def tokens_of(channel: Channel) -> list[int]:
    """The rest of an answer, however often it waits."""
    tokens = []
    while isinstance(message := await heard(channel, Token), Token):
        tokens.append(message.token)
        if message.finish:
            break
    return tokens


async def test_a_younger_job_waits_for_an_older_one_and_goes_on(model: TinyModel) -> None:
    expected = model.greedy(PROMPT, MOST - len(PROMPT))
    async with real_ring(model, 1) as coordinator:
        [stage] = coordinator.stages
        stage.jobs.kv = KvRoom(MOST + BLOCK)
        async with coordinator.opened(ticket(coordinator, 1)) as old:
            while not stage.jobs.count:
                await trio.sleep(0.005)
            async with coordinator.opened(ticket(coordinator, 2)) as young:
                await young.send(Prompt(), pack_tokens(PROMPT))
                began = []
                while isinstance(message := await heard(young, Token, Waiting), Token):
                    began.append(message.token)
                assert began == expected[: BLOCK - len(PROMPT) + 1]
                async with coordinator.opened(ticket(coordinator, 3)) as third:
                    assert (await next_of(third, Refused)).code == "no_capacity"

                await old.send(Prompt(), pack_tokens(PROMPT))
                assert await tokens_of(old) == expected
                await old.send(End())
                await heard(old, ReceiptReply)
                assert began + await tokens_of(young) == expected
                await young.send(End())
                await heard(young, ReceiptReply)
        while stage.jobs.count:
            await trio.sleep(0.005)
        assert stage.jobs.kv.free == stage.jobs.kv.tokens


async def test_a_job_that_ends_while_it_waits_gives_its_room_back(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        [stage] = coordinator.stages
        stage.jobs.kv = KvRoom(MOST + BLOCK)
        async with coordinator.opened(ticket(coordinator, 1)):
            while not stage.jobs.count:
                await trio.sleep(0.005)
            async with coordinator.opened(ticket(coordinator, 2)) as young:
                await young.send(Prompt(), pack_tokens(PROMPT))
                while isinstance(await heard(young, Token, Waiting), Token):
                    pass
                await young.send(End())
                await heard(young, ReceiptReply)
            assert stage.jobs.kv.free == MOST


async def test_more_jobs_at_once_than_would_fit_whole(model: TinyModel) -> None:
    """In both stages of a ring, where each decides for itself who waits."""
    count = MOST - len(PROMPT)
    expected = model.greedy(PROMPT, count)
    answers: list[list[int]] = []
    async with real_ring(model, 2) as coordinator:
        for stage in coordinator.stages:
            stage.jobs.kv = KvRoom(MOST + 2 * BLOCK)

        async def ask(begun_at: int) -> None:
            end = await coordinator.answer(ticket(coordinator, begun_at), PROMPT)
            assert (end.finish, end.failures) == ("length", [])
            answers.append(end.tokens)

        async with trio.open_nursery() as nursery:
            for begun_at in (1, 2, 3):
                nursery.start_soon(ask, begun_at)
        assert answers == [expected] * 3
