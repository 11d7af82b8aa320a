"""Workers that run parts of what they have loaded, for some jobs, while others use all of it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from azu.channel import Channel
from azu.identity import Kind, seal
from azu.wire.document import encode_cbor
from azu.wire.messages import JOB, JOB_PROTOCOL, Open, Refused
from tests.node.real_stages import (
    LIMIT,
    Coordinator,
    Stage,
    TinyModel,
    identity,
    next_of,
    peer,
    prompt_of,
    real_stage,
    tiny_model,
)

LOADED = ((0, 4), (1, 4), (0, 3))
# (worker, start, end) of each stage; each worker runs a part of its layers for one chain, and all for another.
CHAINS = (
    ((0, 0, 4),),
    ((0, 0, 1), (1, 1, 4)),
    ((2, 0, 3), (0, 3, 4)),
    ((2, 0, 1), (0, 1, 2), (1, 2, 4)),
    ((0, 0, 2), (2, 2, 3), (1, 3, 4)),
    ((2, 0, 2), (1, 2, 4)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def chains(model: TinyModel) -> AsyncIterator[list[Coordinator]]:
    """One coordinator, as seen by jobs of each of the chains."""
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(real_stage(model, n + 1, *LOADED[n])) for n in range(3)]
            me = await stack.enter_async_context(peer(99))
            for worker in workers:
                await me.connect(worker.peer_id, worker.overlay.addrs)
                for other in workers:
                    if other is not worker:
                        await other.overlay.connect(worker.peer_id, worker.overlay.addrs)
            yield [Coordinator(identity(99), me, stages(workers, chain), model.manifest.digest) for chain in CHAINS]


def stages(workers: list[Stage], chain: tuple[tuple[int, int, int], ...]) -> list[Stage]:
    return [replace(workers[n], start=start, end=end) for n, start, end in chain]


@pytest.mark.parametrize("seed", range(2))
async def test_jobs_of_different_parts_answer_as_alone(model: TinyModel, seed: int) -> None:
    rng = random.Random(seed)
    jobs = [
        (chain % len(CHAINS), prompt_of(rng.choice([1, 5, 40, 300]), chain), rng.randint(2, 20)) for chain in range(18)
    ]
    answers: dict[int, list[int]] = {}
    async with chains(model) as coordinators:

        async def ask(number: int) -> None:
            chain, prompt, count = jobs[number]
            await trio.sleep(rng.uniform(0.0, 0.3))
            end = await coordinators[chain].answer(coordinators[chain].ticket(len(prompt), count), prompt)
            assert end.failures == []
            for index, (_, start, stop) in enumerate(CHAINS[chain]):
                receipt = end.receipts[index]
                assert (receipt.start, receipt.end, receipt.tokens) == (start, stop, len(prompt) + count - 1)
            answers[number] = end.tokens

        async with trio.open_nursery() as nursery:
            for number in range(len(jobs)):
                nursery.start_soon(ask, number)
        for stage in coordinators[3].stages:
            await stage.until_idle()
            assert stage.device.passes.statistics().largest > 1
    assert [answers[number] for number in range(len(jobs))] == [model.greedy(prompt, n) for _, prompt, n in jobs]


@pytest.mark.parametrize(
    ("worker", "start", "end", "code"),
    [
        (1, 0, 2, "wrong_range"),
        (1, 0, 4, "wrong_range"),
        (2, 2, 4, "wrong_range"),
        (2, 3, 4, "wrong_range"),
        (0, 0, 5, "bad_document"),
        (0, -1, 2, "bad_document"),
        (0, 2, 2, "bad_document"),
        (0, 3, 1, "bad_document"),
        (0, 0, 2**63, "bad_document"),
    ],
)
async def test_hostile_parts(model: TinyModel, worker: int, start: int, end: int, code: str) -> None:
    """Outside of what is loaded, empty, reversed; signed by the coordinator that the worker trusts."""
    async with chains(model) as coordinators:
        coordinator, stage = coordinators[3], [coordinators[3].stages[n] for n in (1, 2, 0)][worker]
        others = [(identity(51).peer_id, 0, start), (stage.peer_id, start, end), (identity(52).peer_id, end, 4)]
        entries: list[dict[str, Any]] = [
            {"peer_id": peer_id, "start": a, "end": b} for peer_id, a, b in others if a != b or peer_id == stage.peer_id
        ]
        ticket = coordinator.ticket(4).model_dump() | {"stages": entries}
        async with await coordinator.overlay.open_stream(stage.peer_id, JOB_PROTOCOL) as stream:
            channel = Channel(stream, JOB)
            await channel.send(Open(), seal(coordinator.identity, Kind.JOB_TICKET, encode_cbor(ticket)))
            assert (await next_of(channel, Refused)).code == code
        await stage.until_idle()
        end_ = await coordinators[0].answer(coordinators[0].ticket(4), prompt_of(4))
        assert end_.tokens == model.greedy(prompt_of(4), 8)
