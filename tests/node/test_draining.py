"""A stage whose worker is about to leave: what it tells, what it still does, and when it is free to go."""

from __future__ import annotations

from typing import TypeVar

import pytest
import trio

from azu.channel import Channel
from azu.crossings import token_crossing
from azu.tickets import open_receipt, sign_ticket
from azu.wire.messages import Amend, End, Leaving, Message, Paused, Prompt, ReceiptReply, Refused, Token
from azu.wire.tokens import pack_tokens
from tests.node.real_stages import Stage, TinyModel, next_of, prompt_of, real_ring, tiny_model

M = TypeVar("M", bound=Message)
PROMPT = prompt_of(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


async def test_a_worker_that_leaves_runs_its_jobs_until_they_are_ended(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        stage = coordinator.stages[0]
        async with trio.open_nursery() as nursery, coordinator.opened(coordinator.ticket(5, 3_000)) as channel:
            await channel.send(Prompt(), pack_tokens(PROMPT))
            await next_of(channel, Token)
            stage.jobs.leave()
            served = trio.Event()
            nursery.start_soon(_tell_when_served, stage, served)
            assert await until(channel, Leaving) == Leaving()
            tokens = [await until(channel, Token) for _ in range(5)]
            answer = model.greedy(PROMPT, tokens[-1].index + 1)
            assert [each.token for each in tokens] == answer[-5:]
            async with coordinator.opened(coordinator.ticket(5)) as refused:
                assert (await next_of(refused, Refused)).code == "leaving"
            assert not served.is_set()
            await channel.send(End(tokens=3))
            _, receipt = open_receipt(bytes((await _received(channel, ReceiptReply))[1]))
            assert receipt.sent == token_crossing(5, model.greedy(PROMPT, 3))
            await served.wait()


async def test_a_stage_that_is_paused_gives_its_word_on_what_went_before(model: TinyModel) -> None:
    """For as many tokens as the coordinator has."""
    async with real_ring(model, 1) as coordinator:
        ticket = coordinator.ticket(5, 3_000)
        async with coordinator.opened(ticket) as channel:
            await channel.send(Prompt(), pack_tokens(PROMPT))
            while (await until(channel, Token)).index < 7:
                pass
            amended = ticket.amended({}, ticket.issued_at)
            await channel.send(Amend(known=6), sign_ticket(coordinator.identity, amended))
            paused = await until(channel, Paused)
            answer = model.greedy(PROMPT, 6)
            assert paused.sent == token_crossing(5, answer)
            assert paused.received == token_crossing(0, [*PROMPT, *answer[:-1]])


async def _tell_when_served(stage: Stage, served: trio.Event) -> None:
    await stage.jobs.until_served()
    served.set()


async def until(channel: Channel, kind: type[M]) -> M:
    """The next message of that kind."""
    return (await _received(channel, kind))[0]


async def _received(channel: Channel, kind: type[M]) -> tuple[M, bytearray]:
    while (received := await channel.receive()) is not None:
        message, body = received
        if isinstance(message, kind):
            return message, body
    raise AssertionError("the job has ended")
