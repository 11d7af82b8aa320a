"""A stage whose coordinator changes the ring under it: what it answers, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from azu.channel import Channel
from azu.identity import Identity
from azu.tickets import JobTicket, sign_ticket
from azu.wire.messages import (
    Amend,
    End,
    Message,
    Paused,
    Ping,
    Prompt,
    Ready,
    ReceiptReply,
    Refused,
    Resume,
    Token,
)
from azu.wire.tokens import pack_tokens, unpack_tokens
from tests.node.real_stages import (
    Coordinator,
    TinyModel,
    identity,
    next_of,
    prompt_of,
    real_ring,
    tiny_model,
)

PROMPT = prompt_of(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@dataclass
class Running:
    """A job in a single stage, and the tokens that came of it."""

    coordinator: Coordinator
    channel: Channel
    ticket: JobTicket
    tokens: list[int]

    async def amend(self, signer: Identity | None = None, known: int | None = None, **changes: Any) -> None:
        ticket = self.ticket.model_copy(update={"epoch": self.ticket.epoch + 1} | changes)
        envelope = sign_ticket(signer or self.coordinator.identity, ticket)
        await self.channel.send(Amend(known=len(self.tokens) if known is None else known), envelope)
        self.ticket = ticket

    async def until(self, kind: type[Message]) -> tuple[Any, bytearray]:
        """The next message of that kind; tokens that come first are noted."""
        while (received := await self.channel.receive()) is not None:
            message, body = received
            if isinstance(message, kind):
                return message, body
            if isinstance(message, Token):
                assert message.index == len(self.tokens)
                self.tokens.append(message.token)
            else:
                assert isinstance(message, Ping | Ready)
        return None, bytearray()

    async def paused(self) -> Paused:
        """What the stage holds; tokens that it knows are noted."""
        before = len(self.tokens)
        paused, body = await self.until(Paused)
        assert isinstance(paused, Paused)
        known = unpack_tokens(body)
        assert list(known[: len(self.tokens) - before]) == self.tokens[before:]
        self.tokens += known[len(self.tokens) - before :]
        return paused

    async def resume(self, position: int, **changes: Any) -> None:
        fields = {"epoch": self.ticket.epoch, "position": position, "send_from": 0, "known": len(self.tokens)}
        await self.channel.send(Resume.model_validate(fields | changes), pack_tokens(self.tokens))

    async def goes_on(self, model: TinyModel) -> None:
        count = len(self.tokens) + 10
        while len(self.tokens) < count:
            token, _ = await self.until(Token)
            assert token.index == len(self.tokens)
            self.tokens.append(token.token)
        assert self.tokens == model.greedy(PROMPT, len(self.tokens))


@asynccontextmanager
async def running(model: TinyModel, max_tokens: int = 3_000) -> AsyncIterator[Running]:
    async with real_ring(model, 1) as coordinator:
        ticket = coordinator.ticket(len(PROMPT), max_tokens)
        async with coordinator.opened(ticket) as channel:
            await channel.send(Prompt(), pack_tokens(PROMPT))
            job = Running(coordinator, channel, ticket, [])
            token, _ = await job.until(Token)
            job.tokens.append(token.token)
            yield job
        await coordinator.stages[0].until_idle()


async def test_a_stage_pauses_and_goes_on_where_it_is_told_to(model: TinyModel) -> None:
    async with running(model) as job:
        for afresh in (False, True, False):
            await job.amend()
            paused = await job.paused()
            assert paused.epoch == job.ticket.epoch
            assert paused.position == len(PROMPT) + len(job.tokens) - 1
            with trio.move_on_after(0.05):  # it does nothing until it is told to
                await job.until(Token)
                pytest.fail("a paused stage went on")
            await job.resume(0 if afresh else paused.position)
            await job.goes_on(model)
        await job.channel.send(End())
        _, receipt = await job.until(ReceiptReply)
        assert receipt


async def test_only_the_newest_amendment_counts(model: TinyModel) -> None:
    async with running(model) as job:
        known = len(job.tokens)
        for _ in range(3):
            await job.amend(known=known)
        while (paused := await job.paused()).epoch < job.ticket.epoch:
            del job.tokens[known:]  # told again with the next one
        await job.channel.send(Resume(epoch=1, position=0, send_from=0, known=0))  # too late
        await job.resume(paused.position)
        await job.goes_on(model)


STRANGER = identity(50)


@pytest.mark.parametrize(
    ("signer", "changes"),
    [
        (STRANGER, {}),
        (STRANGER, {"coordinator": STRANGER.peer_id}),
        (None, {"epoch": 0}),
        (None, {"price": 0}),
        (None, {"max_tokens": 4_000}),
        (None, {"job_id": b"j" * 16}),
        (None, {"issued_at": 0, "expires_at": 1}),
    ],
)
async def test_an_amendment_that_may_not_be_ends_the_job(
    model: TinyModel, signer: Identity | None, changes: dict[str, Any]
) -> None:
    async with running(model) as job:
        await job.amend(signer, **changes)
        assert await job.until(Paused) == (None, bytearray())
        stage = job.coordinator.stages[0]
        await stage.until_idle()
        assert stage.overlay.statistics().violations == {job.coordinator.identity.peer_id: 1}


@pytest.mark.parametrize(
    "changes", [{"epoch": 2}, {"position": 1}, {"known": 0}, {"known": 2_999}, {"send_from": 10_000}]
)
async def test_a_stage_does_not_go_on_where_it_cannot(model: TinyModel, changes: dict[str, int]) -> None:
    async with running(model) as job:
        await job.amend()
        paused = await job.paused()
        await job.resume(**({"position": paused.position} | changes))
        assert await job.until(Token) == (None, bytearray())


async def test_what_is_not_paused_is_not_resumed(model: TinyModel) -> None:
    async with running(model) as job:
        await job.resume(0)
        await job.until(ReceiptReply)
        await job.coordinator.stages[0].until_idle()


async def test_a_stage_that_is_taken_over_waits_to_be_told_where_to_begin(model: TinyModel) -> None:
    tokens = model.greedy(PROMPT, 9)
    async with real_ring(model, 1) as coordinator:
        ticket = coordinator.ticket(len(PROMPT), 20, epoch=3)
        async with coordinator.opened(ticket) as channel:
            await channel.send(Prompt(), pack_tokens(PROMPT))
            job = Running(coordinator, channel, ticket, tokens)
            assert await job.paused() == Paused(epoch=3, position=0, can_replay=True)
            await job.resume(0)
            await job.goes_on(model)
        await coordinator.stages[0].until_idle()
        for epoch in (2, 3):  # it is over, and so is what came before
            async with coordinator.opened(ticket.model_copy(update={"epoch": epoch})) as channel:
                assert (await next_of(channel, Refused)).code == "duplicate_job"
