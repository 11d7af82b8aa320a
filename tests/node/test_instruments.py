"""What a worker counts is what happened: exactly where a script says what that is, and in real stages."""

from __future__ import annotations

import time

import pytest
import trio

from azu.wire.messages import End, Prompt, Token
from azu.wire.tokens import pack_tokens
from node import instruments
from node.engine.blocks import BLOCK
from node.engine.instruments import Passes
from node.instruments import Instruments, LoopWatch
from tests.node.real_stages import KV_TOKENS, TinyModel, next_of, prompt_of, real_ring, tiny_model

HIDDEN_BYTES = 32 * 4  # of a row of the tiny model, in float32


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(instruments, "time", clock)
    return clock


def test_a_stall_lasts_from_when_the_loop_should_wake_until_it_looks_for_input(clock: Clock) -> None:
    watch = LoopWatch()
    stalls = []
    for wait, timeout, turn in [
        (0.25, 8.0, 0.5),  # input came before a timer was due
        (2.0, 1.0, 0.5),  # a timer was due a second before the loop woke up
        (0.0, 0.0, 0.125),  # tasks were ready
        (8.0, 8.0, 0.0),
    ]:
        watch.before_io_wait(timeout)
        clock.now += wait
        watch.after_io_wait(timeout)
        clock.now += turn
        watch.before_io_wait(0.0)
        stalls.append(watch.take_longest())
        watch.after_io_wait(0.0)
    assert stalls == [0.5, 1.5, 0.125, 0.0]
    assert (watch.longest_s, watch.busy_s) == (1.5, 0.5 + 0.5 + 0.125)


async def test_a_real_loop_that_is_blocked_is_seen_while_it_is_watched() -> None:
    watch = LoopWatch()
    time.sleep(0.05)  # noqa: ASYNC251 - not watched yet
    with watch.watching():
        await trio.sleep(0.001)
        before = watch.longest_s
        time.sleep(0.06)  # noqa: ASYNC251 - the stall
        await trio.sleep(0.001)
        assert watch.longest_s >= 0.06
        assert watch.busy_s >= 0.06
        assert watch.longest_s > before
    seen = watch.busy_s
    await trio.sleep(0.001)
    assert watch.busy_s == seen


def test_the_last_minute_forgets_what_is_older(clock: Clock) -> None:
    passes = Passes()
    all_of = Instruments(passes)
    minutes = []
    for slot in range(20):
        clock.now += 5
        if slot == 2:
            passes.note(clock.now - 0.75, clock.now, 4, [1, 1, 7], [clock.now - 1, clock.now - 1, clock.now - 0.75])
            all_of.ring.note_sent(100, 0.25, 0.5)
        minute = all_of.last_minute()
        minutes.append((minute.sums.at, minute.sums.rows, minute.longest_pass_s))
        all_of.turn()
    assert minutes[1:4] == [(10, 0, 0.0), (15, 9, 0.75), (20, 9, 0.75)]
    assert minutes[13:17] == [(65, 9, 0.75), (65, 9, 0.75), (65, 0, 0.0), (65, 0, 0.0)]
    start = all_of.since_start()
    assert (start.sums.at, start.sums.passes, start.sums.steps, start.sums.rows) == (100, 1, 3, 9)
    assert start.sums.token_layers == 36
    assert (start.sums.compute_s, start.sums.waited_s, start.longest_pass_s) == (0.75, 0.5, 0.75)
    assert (start.sums.messages, start.sums.sent_bytes, start.sums.serialise_s, start.sums.wire_s) == (
        1,
        100,
        0.25,
        0.5,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


async def test_stages_count_what_passes_between_them(model: TinyModel) -> None:
    async with real_ring(model, 3) as coordinator:
        prompt, count = prompt_of(300), 6  # two chunks, then a row for each token but the last
        started = time.perf_counter()
        end = await coordinator.answer(coordinator.ticket(300, count), prompt)
        lasted = time.perf_counter() - started
        assert len(end.tokens) == count
        first, middle, last = (stage.jobs.meter for stage in coordinator.stages)
        chunks, size = 2 + count - 1, (300 + count - 1) * HIDDEN_BYTES
        assert (first.messages, first.sent_bytes, first.inputs, first.received_bytes) == (chunks, size, count - 1, 0)
        assert (middle.messages, middle.sent_bytes, middle.inputs, middle.received_bytes) == (chunks, size) * 2
        assert (last.messages, last.sent_bytes, last.inputs, last.received_bytes) == (count - 1, 0, chunks, size)
        for meter in (first, middle, last):
            spent = (meter.serialise_s, meter.wire_s, meter.credit_s, meter.elsewhere_s)
            assert min(spent[0], spent[1], spent[3]) > 0
            assert sum(spent) < lasted
        assert [stage.jobs.admitted for stage in coordinator.stages] == [1, 1, 1]


async def test_a_running_jobs_cache_is_seen_to_fill(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        jobs, ticket = coordinator.stages[0].jobs, coordinator.ticket(7, 3)
        async with coordinator.opened(ticket) as channel:
            await channel.send(Prompt(), pack_tokens(prompt_of(7)))
            while not (await next_of(channel, Token)).finish:
                assert jobs.kv_tokens_filled >= 7
            assert (jobs.count, jobs.kv_tokens_filled, KV_TOKENS - jobs.kv.free) == (1, 9, BLOCK)
            await channel.send(End())
            await coordinator.stages[0].until_idle()
        assert jobs.kv_tokens_filled == 0
