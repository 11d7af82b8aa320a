"""The banker's rule: every job comes to its end, the oldest first, and nothing is given out twice."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from azu.errors import InternalError
from node.engine.blocks import BLOCK, KvBlocks


def age(number: int) -> tuple[int, bytes]:
    return number, bytes([number])


def test_many_short_answers_share_what_one_long_one_may_need() -> None:
    blocks: KvBlocks[int] = KvBlocks(64 * BLOCK)
    for job in range(40):  # reserved whole, two of them would fit
        assert blocks.can_enter(age(job), BLOCK, 24 * BLOCK)
        blocks.enter(job, age(job), BLOCK, 24 * BLOCK)
    assert blocks.room == BLOCK
    assert not blocks.can_enter(age(50), 2 * BLOCK, 24 * BLOCK)
    blocks.check_integrity()


def test_the_oldest_never_waits_and_the_younger_keep_what_they_have() -> None:
    blocks: KvBlocks[str] = KvBlocks(10 * BLOCK)
    blocks.enter("young", age(2), 3 * BLOCK, 8 * BLOCK)
    blocks.enter("old", age(1), BLOCK, 6 * BLOCK)
    assert blocks.grow("young", 4 * BLOCK)
    assert not blocks.grow("young", 4 * BLOCK + 1)
    for count in range(2, 7):
        assert blocks.grow("old", count * BLOCK)
    assert (blocks.free, blocks.room) == (0, 0)
    blocks.leave("old")
    assert blocks.grow("young", 8 * BLOCK)


def test_what_can_never_be_given_is_not_let_in() -> None:
    blocks: KvBlocks[str] = KvBlocks(4 * BLOCK + 15)
    assert blocks.tokens == 4 * BLOCK
    assert not blocks.can_enter(age(1), 1, 4 * BLOCK + 1)
    assert blocks.can_enter(age(1), 1, 4 * BLOCK)
    blocks.enter("job", age(1), 1, 2 * BLOCK)
    with pytest.raises(InternalError):
        blocks.enter("job", age(2), 1, BLOCK)
    with pytest.raises(InternalError):
        blocks.grow("job", 2 * BLOCK + 1)
    with pytest.raises(InternalError):
        KvBlocks[str](0).enter("job", age(1), 1, 1)
    blocks.leave("nobody")
    blocks.check_integrity()


class Ring(RuleBasedStateMachine):
    """Jobs in two workers of different sizes, which each of them needs: none shall wait for another for ever."""

    @initialize(first=st.integers(1, 30), second=st.integers(1, 30))
    def begin(self, first: int, second: int) -> None:
        self.workers: list[KvBlocks[int]] = [KvBlocks(first * BLOCK), KvBlocks(second * BLOCK)]
        self.limits: dict[int, int] = {}
        self.held: dict[int, int] = {}

    @rule(job=st.integers(0, 255), first=st.integers(1, 400), more=st.integers(0, 400))
    def enter(self, job: int, first: int, more: int) -> None:
        if job in self.limits or not all(each.can_enter(age(job), first, first + more) for each in self.workers):
            return
        for worker in self.workers:
            worker.enter(job, age(job), first, first + more)
        self.limits[job], self.held[job] = first + more, first

    @precondition(lambda self: self.limits)
    @rule(data=st.data(), more=st.integers(1, 60))
    def grow(self, data: st.DataObject, more: int) -> None:
        job = data.draw(st.sampled_from(sorted(self.limits)))
        wanted = min(self.held[job] + more, self.limits[job])
        given = [worker.grow(job, wanted) for worker in self.workers]  # one may, and the other not
        if all(given):
            self.held[job] = wanted

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(sorted(self.limits))))

    def _leave(self, job: int) -> None:
        for worker in self.workers:
            worker.leave(job)
        del self.limits[job], self.held[job]

    @invariant()
    def nothing_is_given_twice(self) -> None:
        for worker in getattr(self, "workers", ()):
            worker.check_integrity()
            least = sum(-(-held // BLOCK) for held in self.held.values())
            assert worker.free <= worker.tokens - least * BLOCK

    def teardown(self) -> None:
        for job in sorted(getattr(self, "limits", ())):  # the oldest of all can always go on, in every worker
            assert all(worker.grow(job, self.limits[job]) for worker in self.workers)
            self._leave(job)


TestRing = Ring.TestCase
