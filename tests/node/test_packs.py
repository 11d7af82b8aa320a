"""Decoded tokens of several jobs in one frame: as answers alone, with whatever a neighbour does or does not speak."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import outcome
import pytest
import trio
import trio.testing

from azu.channel import Channel
from azu.errors import NetworkError, ProtocolError
from azu.wire.messages import (
    MAX_PACK_BYTES,
    PACK,
    PACK_PROTOCOL,
    Chunk,
    Credit,
    Nexts,
    Token,
)
from azu.wire.tensors import TensorHeader
from node.agenda import Agenda, Input, Result
from node.engine.stage import Output, Step
from node.outlet import Outlet
from node.packs import PackLink
from node.ring import WINDOW
from tests.node.real_stages import LIMIT, TinyModel, identity, prompt_of, real_ring, tiny_model
from tests.node.test_hostile_neighbours import FIRST, LAST, Middle, middle
from tests.node.test_pack_link import ROW, WIDTH, rows, until_counted
from tests.node.test_session import accept, session, ticket
from tests.node.test_session import chunk as chunk_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


# --- what may come in one


def test_what_has_been_through_the_ring_may_come_in_a_pack_and_nothing_before() -> None:
    """Three tokens of prompt: position 3 is the first decoded one, and nothing says that what is before it is here."""
    subject = ticket(prompt_tokens=3, max_tokens=5)
    first, last = session(subject, 0), session(subject, 1)
    size, dtype = last.row_bytes, last.dtype
    list(first.id_chunks((1, 2, 3)))
    accept(last, chunk_of(0, 3, True))
    for wrong in (lambda: first.accept_packed_next(0, 1), lambda: last.accept_row(3, dtype, size)):
        with pytest.raises(ProtocolError) as raised:
            wrong()
        assert raised.value.code == "bad_position"
    assert first.accept_next(0, 1) == 1
    accept(last, chunk_of(3, 1, True))
    assert [first.accept_packed_next(index, 7) for index in (1, 2)] == [7, 7]
    for wrong_dtype, wrong_size in ((dtype, size - 1), ("bfloat16", size)):
        with pytest.raises(ProtocolError) as raised:
            last.accept_row(4, wrong_dtype, wrong_size)
        assert raised.value.code == "bad_tensor"
    for position in (4, 5, 6):
        last.accept_row(position, dtype, size)
    for late in (lambda: last.accept_row(7, dtype, size), lambda: first.accept_packed_next(5, 7)):
        with pytest.raises(ProtocolError):  # the last token is never run
            late()
    with pytest.raises(ProtocolError) as raised:
        first.accept_row(6, dtype, size)
    assert raised.value.code == "unexpected_message"


# --- a ring


async def answer_all(model: TinyModel, *, refusing: int = -1) -> tuple[int, int]:
    """Eight jobs at once through three stages: frames that the first stage sent, and tokens. One may take no packs."""
    prompts = [prompt_of(3 + number, number) for number in range(8)]
    answers: dict[int, list[int]] = {}
    async with real_ring(model, 3, refusing=refusing) as coordinator:

        async def ask(number: int) -> None:
            end = await coordinator.answer(coordinator.ticket(len(prompts[number]), 40), prompts[number])
            assert not end.failures
            assert {receipt.tokens for receipt in end.receipts.values()} == {len(prompts[number]) + 39}
            assert end.receipts[0].sent == end.receipts[1].received
            assert end.receipts[1].sent == end.receipts[2].received
            answers[number] = end.tokens

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(ask, number)
        for stage in coordinator.stages:
            await stage.until_idle()
        messages = coordinator.stages[0].jobs.meter.messages
    assert [answers[number] for number in range(8)] == [model.greedy(prompt, 40) for prompt in prompts]
    return messages, 8 * 40


async def test_jobs_share_frames_and_answer_as_alone(model: TinyModel) -> None:
    messages, tokens = await answer_all(model)
    assert messages < tokens / 2


@pytest.mark.parametrize("stages", [1, 2, 3])
async def test_most_tokens_wake_no_task_on_their_way(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    woken: list[Input] = []
    put = Agenda.put

    def noted(self: Agenda, work: Input) -> None:
        woken.append(work)
        put(self, work)

    monkeypatch.setattr(Agenda, "put", noted)
    async with real_ring(model, stages) as coordinator:
        end = await coordinator.answer(coordinator.ticket(5, 60), prompt_of(5))
    assert end.tokens == model.greedy(prompt_of(5), 60)
    assert len(woken) < 60 * stages / 2


@pytest.mark.parametrize("stages", [1, 3])
async def test_tokens_of_all_jobs_come_to_their_coordinator_in_shared_frames(model: TinyModel, stages: int) -> None:
    prompts = [prompt_of(3 + number, number) for number in range(8)]
    answers: dict[int, list[int]] = {}
    async with real_ring(model, stages) as coordinator:
        coordinator.overlay.handle(PACK_PROTOCOL, coordinator.take_packs)

        async def ask(number: int) -> None:
            ticket = coordinator.ticket(len(prompts[number]), 40)
            answers[number] = (await coordinator.answer(ticket, prompts[number])).tokens

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(ask, number)
        for stage in coordinator.stages:
            await stage.until_idle()
    assert [answers[number] for number in range(8)] == [model.greedy(prompt, 40) for prompt in prompts]
    assert 0 < coordinator.frames < 8 * 40 / 2


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_token_that_no_frame_took_goes_by_the_jobs_own_stream(is_lost: bool) -> None:
    agenda, link = Agenda(), PackLink(None, "coordinator")  # type: ignore[arg-type]
    last, subject = session(ticket(), 1), ticket()
    outlet = Outlet(last, None, None, agenda, lambda index, token: None)  # type: ignore[arg-type]
    outlet.reports = link
    token = Token(index=0, token=5)
    assert outlet.pass_at_once(Result(3, 1, b"", token))
    assert await agenda.next() is token  # it is not open
    link.is_open = True
    assert outlet.pass_at_once(Result(3, 1, b"", token))
    [(entry, then)] = link._waiting
    assert (entry.job_id, entry.epoch, entry.position, entry.token) == (subject.job_id, subject.epoch, 0, 5)
    then(NetworkError("gone") if is_lost else None)
    with trio.move_on_after(0 if not is_lost else LIMIT) as patience:
        assert await agenda.next() is token
    assert patience.cancelled_caught != is_lost


@pytest.mark.parametrize("stage", range(3))
async def test_a_stage_that_takes_no_packs_gets_each_job_on_its_own_stream(model: TinyModel, stage: int) -> None:
    messages, tokens = await answer_all(model, refusing=stage)
    assert messages == tokens if stage == 1 else messages < tokens


@pytest.mark.parametrize(("hidden", "is_packed"), [(MAX_PACK_BYTES // 2, True), (MAX_PACK_BYTES // 2 + 1, False)])
def test_rows_that_are_too_wide_for_a_frame_go_by_ring_streams(hidden: int, is_packed: bool) -> None:
    subject = session(ticket(prompt_tokens=3), 1, hidden)  # in float16
    assert subject.may_pack(4) == is_packed


async def test_a_leg_that_is_paused_waits_for_the_step_that_no_task_waits_for(model: TinyModel) -> None:
    entered, go_on = threading.Event(), threading.Event()
    async with real_ring(model, 2) as coordinator, trio.open_nursery() as nursery:
        [stage, _] = coordinator.stages
        assert stage.jobs.loaded is not None
        runner = stage.jobs.loaded.stage
        run_steps, count = runner.run_steps, 0

        def held(steps: Sequence[Step]) -> list[outcome.Outcome[Output]]:
            nonlocal count
            count += 1
            results = run_steps(steps)
            if count == 20:
                entered.set()
                assert go_on.wait(LIMIT)
            return results

        runner.run_steps = held  # type: ignore[method-assign]
        nursery.start_soon(coordinator.answer, coordinator.ticket(5, 60), prompt_of(5))
        while not entered.is_set():
            await trio.sleep(0.001)
        [job] = stage.jobs._jobs.values()
        leg, progress = job._leg, job._progress
        state = progress.state  # the job may end soon after the leg
        assert state is not None
        assert leg._agenda.is_stepping
        leg.pause()
        await trio.sleep(0.05)
        assert not leg._intake._is_closed, "it has not ended"
        go_on.set()
        while not leg._intake._is_closed:
            await trio.sleep(0.001)
        assert progress.positions == state.position
        nursery.cancel_scope.cancel()


# --- hostile neighbours


@asynccontextmanager
async def decoding(model: TinyModel) -> AsyncIterator[tuple[Middle, Channel]]:
    """The middle stage of a job with one token of prompt, at position 2; and the first stage's stream of packs."""
    async with middle(model, prompt_tokens=1) as ring:
        for position in (0, 1):
            tensor = TensorHeader(dtype="float32", shape=(1, WIDTH))
            await ring.previous.send(Chunk(position=position, tensor=tensor, sample=True), ROW)
            await ring.following.expect(Chunk)
        async with await ring.first.open_stream(ring.stage.peer_id, PACK_PROTOCOL) as stream:
            yield ring, Channel(stream, PACK)


async def test_a_pack_goes_on_as_a_chunk_where_the_next_stage_takes_no_packs(model: TinyModel) -> None:
    async with decoding(model) as (ring, pack):
        for position in (2, 3):
            await pack.send(rows((ring.job_id, 0, position)), ROW)
            chunk, _ = await ring.following.expect(Chunk)
            assert (chunk.position, chunk.sample) == (position, True)
        assert await ring.end() == []


Deed = Callable[[Middle, Channel], Awaitable[None]]


async def repeated(ring: Middle, pack: Channel) -> None:
    await pack.send(rows((ring.job_id, 0, 1)), ROW)


async def skipping(ring: Middle, pack: Channel) -> None:
    await pack.send(rows((ring.job_id, 0, 3)), ROW)


async def past_the_end(ring: Middle, pack: Channel) -> None:
    for position in range(2, 21):
        await pack.send(rows((ring.job_id, 0, position)), ROW)
        if position < 20:
            await ring.following.expect(Chunk)
            await ring.following.send(Credit(frames=1))


async def wrong_width(ring: Middle, pack: Channel) -> None:
    await pack.send(rows((ring.job_id, 0, 2), width=16), ROW[:64])


async def wrong_dtype(ring: Middle, pack: Channel) -> None:
    await pack.send(rows((ring.job_id, 0, 2), dtype="bfloat16"), ROW[:64])


async def token_in_the_middle(ring: Middle, pack: Channel) -> None:
    await pack.send(Nexts(jobs=((ring.job_id, 0, 2, 1),)))


async def far_too_many(ring: Middle, pack: Channel) -> None:
    jobs = [(ring.job_id, 0, 2 + number) for number in range(WINDOW + 2)]
    await pack.send(rows(*jobs), ROW * len(jobs))


@pytest.mark.parametrize(
    "deed", [repeated, skipping, past_the_end, wrong_width, wrong_dtype, token_in_the_middle, far_too_many]
)
async def test_the_previous_stage_breaks_the_protocol(model: TinyModel, deed: Deed) -> None:
    async with decoding(model) as (ring, pack):
        await deed(ring, pack)
        assert (await ring.failure()).peer_id == identity(FIRST).peer_id
        assert await pack.receive() is None  # its stream was reset
        assert ring.stage.overlay.statistics().violations == {identity(FIRST).peer_id: 1}
        assert await ring.end() == []


async def test_who_is_not_the_previous_stage_of_a_job_cannot_harm_it(model: TinyModel) -> None:
    async with decoding(model) as (ring, pack):
        async with await ring.last.open_stream(ring.stage.peer_id, PACK_PROTOCOL) as stream:
            await Channel(stream, PACK).send(rows((ring.job_id, 0, 2)), ROW)
            await until_counted(ring.stage.overlay, identity(LAST).peer_id)
        await pack.send(rows((ring.job_id, 0, 2)), ROW)
        await ring.following.expect(Chunk)
        assert await ring.end() == []


async def test_a_job_that_never_was_here_is_a_fault_and_one_that_was_is_none(model: TinyModel) -> None:
    async with decoding(model) as (ring, pack):
        await pack.send(rows((ring.job_id, 1, 2)), ROW)  # of another leg
        await pack.send(rows((ring.job_id, 0, 2)), ROW)
        await ring.following.expect(Chunk)
        assert await ring.end() == []
        await pack.send(rows((ring.job_id, 0, 3)), ROW)
        await pack.send(rows((b"?" * 16, 0, 3)), ROW)
        await until_counted(ring.stage.overlay, identity(FIRST).peer_id)


async def test_a_second_stream_of_a_peer_ends_the_first(model: TinyModel) -> None:
    async with decoding(model) as (ring, pack):
        async with await ring.first.open_stream(ring.stage.peer_id, PACK_PROTOCOL) as stream:
            await Channel(stream, PACK).send(rows((ring.job_id, 0, 2)), ROW)
            await ring.following.expect(Chunk)
            with trio.fail_after(LIMIT):
                assert await pack.receive() is None
            await Channel(stream, PACK).send(rows((ring.job_id, 0, 3)), ROW)
            await ring.following.expect(Chunk)
        assert await ring.end() == []
