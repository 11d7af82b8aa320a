"""A ring of pure stages that die at random, in which a new last stage samples other tokens than the old one did: the
client's tokens are never changed, repeated or lost, and nobody computes what it has and can use.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.mending import Held, Start, settle, work_of

PROMPT = 3
Prefix = tuple[int, ...]  # the tokens up to a position: all that a position's hidden states depend on


@dataclass
class PureStage:
    """One worker's part: what it ran, and what it can send again."""

    number: int  # of the worker; it decides what is sampled
    cache: list[Prefix] = field(default_factory=list)
    can_replay: bool = True
    replay_from: int = 0
    is_new: bool = False
    tokens: list[int] = field(default_factory=list)
    send_from: int = 0
    inbox: deque[Prefix] = field(default_factory=deque)


class PureRing:
    """Stages by index, with queues between them that deliver when they are told to."""

    def __init__(self, stages: int, tokens: int) -> None:
        self.count = tokens
        self.workers = stages
        self.stages = [PureStage(number) for number in range(stages)]
        self.told: deque[int] = deque()  # from the last stage to the first
        self.under_way: deque[int] = deque()  # from the last stage to the client
        self.client: list[int] = []
        self.base = PROMPT
        self.feed: deque[int] = deque(range(PROMPT))  # known tokens that the first stage has to run

    @property
    def is_complete(self) -> bool:
        return len(self.client) == self.count

    def act(self, index: int) -> bool:
        """Let a stage run a position, or (past the last one) the client read a token; whether there was one."""
        if index == len(self.stages):
            if self.under_way:
                self.client.append(self.under_way.popleft())
                return True
            return False
        stage = self.stages[index]
        if index == 0:
            if not self.feed and self.told:
                self.feed.append(self.told.popleft())
                if len(self.stages) > 1:
                    stage.tokens.append(self.feed[0])
            if not self.feed:
                return False
            before = stage.cache[-1] if stage.cache else ()
            self._run(index, (*before, self.feed.popleft()))
            return True
        if not stage.inbox:
            return False
        self._run(index, stage.inbox.popleft())
        return True

    def _run(self, index: int, prefix: Prefix) -> None:
        stage = self.stages[index]
        assert len(prefix) == len(stage.cache) + 1, "a position was left out or run twice"
        stage.cache.append(prefix)
        if index + 1 < len(self.stages):
            if len(prefix) > stage.send_from:
                self.stages[index + 1].inbox.append(prefix)
        elif len(prefix) >= self.base:
            token = hash((prefix, stage.number)) % 50
            stage.tokens.append(token)
            self.under_way.append(token)
            if len(stage.tokens) < self.count:
                self.told.append(token)

    def mend(self, dead: set[int], delivered: int, inherited: int = 0) -> None:
        """Replace stages.

        Args:
            delivered: tokens of those under way that come though the last stage is dead.
            inherited: positions of which the new ones have the old ones' caches.
        """
        known = len(self.client)
        if len(self.stages) - 1 in dead:
            self.under_way = deque(list(self.under_way)[:delivered])
        came = list(self.under_way)
        for index in dead:
            left = self.stages[index].cache[:inherited]
            self.stages[index] = PureStage(self.workers, left, replay_from=len(left), is_new=True)
            self.workers += 1
        ends = (0, len(self.stages) - 1)
        held = [
            Held(
                len(stage.cache),
                stage.can_replay,
                tuple(stage.tokens[known:]) if index in ends else (),
                stage.is_new,
                stage.replay_from,
            )
            for index, stage in enumerate(self.stages)
        ]
        tokens, starts = settle(PROMPT, known, came, held)
        self.client += tokens
        self.under_way.clear()
        self.told.clear()
        if not self.is_complete:
            self._resume(held, starts)

    def _resume(self, held: list[Held], starts: tuple[Start, ...]) -> None:
        self.base = PROMPT + len(self.client)
        sequence = (*range(PROMPT), *self.client)
        self.feed = deque(sequence[starts[0].position :])
        for stage in self.stages:
            stage.inbox.clear()
        for index, (stage, was, start) in enumerate(zip(self.stages, held, starts, strict=True)):
            self._check_start(index, was, starts, sequence)
            stage.cache = stage.cache[: start.position]
            stage.tokens = list(self.client)
            stage.is_new = False
            if start.position == 0:
                stage.can_replay, stage.replay_from = True, 0
            stage.send_from = start.send_from
            if index + 1 < len(self.stages):
                can_send = stage.can_replay and stage.replay_from <= start.send_from
                assert can_send or start.send_from >= len(stage.cache)
                self.stages[index + 1].inbox.extend(stage.cache[start.send_from :])

    def _check_start(self, index: int, was: Held, starts: tuple[Start, ...], sequence: tuple[int, ...]) -> None:
        start, cache = starts[index], self.stages[index].cache
        assert start.position in (0, was.position)
        if start.position < was.position:
            following = starts[index + 1].position if index + 1 < len(starts) else 0
            is_of_use = all(prefix == sequence[: len(prefix)] for prefix in cache) and len(cache) <= self.base
            is_of_use = is_of_use and (index + 1 < len(starts) or len(cache) < self.base)
            can_send = was.can_replay and was.replay_from <= following
            assert not is_of_use or (following < was.position and not can_send)


@settings(max_examples=300)
@given(stages=st.integers(1, 5), count=st.integers(1, 6), data=st.data())
def test_no_token_is_changed_repeated_or_lost(stages: int, count: int, data: st.DataObject) -> None:
    ring = PureRing(stages, count)
    for _ in range(data.draw(st.integers(0, 8))):
        for step in data.draw(st.lists(st.integers(0, stages), max_size=40)):
            ring.act(step)
        if data.draw(st.booleans()):
            ring.stages[data.draw(st.integers(0, stages - 1))].can_replay = False
        seen = list(ring.client)
        dead = data.draw(st.sets(st.integers(0, stages - 1)))
        ring.mend(dead, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 9)))
        assert ring.client[: len(seen)] == seen
        if ring.is_complete:
            return
    while not ring.is_complete:
        assert sum(ring.act(step) for step in range(stages + 1)), "nobody can go on"
    sequence = (*range(PROMPT), *ring.client)
    for stage in ring.stages:
        assert all(prefix == sequence[: len(prefix)] for prefix in stage.cache)


@pytest.mark.parametrize(
    ("stages", "tokens", "starts"),
    [
        # The middle one is new: the first sends it everything again, and it sends on what the last lacks.
        ([Held(9, True, (5,)), Held(), Held(8, True, (5,))], (5,), [(9, 0), (0, 8), (8, 0)]),
        # The first is new: what follows lacks nothing of it but the newest.
        ([Held(), Held(9), Held(8, True, (5,))], (5,), [(0, 9), (9, 8), (8, 0)]),
        # The last is new, and only the first knows its last token.
        ([Held(9, True, (5,)), Held(8), Held()], (5,), [(9, 8), (8, 0), (0, 0)]),
        # Nobody knows the token any more that the middle one has run.
        ([Held(), Held(9), Held()], (), [(0, 0), (0, 0), (0, 0)]),
        # Two neighbours are new: the second is fed through the first.
        ([Held(9, True, (5,)), Held(), Held(), Held(8, True, (5,))], (5,), [(9, 0), (0, 0), (0, 8), (8, 0)]),
        # The history before the new one is gone, but the one before that has its own.
        ([Held(9, True, (5,)), Held(9, False), Held(), Held(8, True, (5,))], (5,), [(9, 0), (0, 0), (0, 8), (8, 0)]),
        # The middle one has the cache of who left it, and the last one lacks nothing from before.
        ([Held(9, True, (5,)), Held(6, True, (), True, 6), Held(8, True, (5,))], (5,), [(9, 6), (6, 8), (8, 0)]),
        # The last one lacks it.
        ([Held(9, True, (5,)), Held(8, True, (), False, 6), Held()], (5,), [(9, 0), (0, 0), (0, 0)]),
        # The last one has such a cache, and does not know what was sampled.
        ([Held(9, True, (5,)), Held(8), Held(6, True, (), True, 6)], (5,), [(9, 8), (8, 6), (6, 0)]),
        # It is gone, but nobody needs it.
        ([Held(8, False, (5,)), Held(8, False), Held(8, True, (5,))], (5,), [(8, 8), (8, 8), (8, 0)]),
    ],
)
def test_where_stages_begin(stages: list[Held], tokens: tuple[int, ...], starts: list[tuple[int, int]]) -> None:
    """Seven tokens of prompt, and one that has come."""
    assert settle(7, 1, (), stages) == (tokens, tuple(Start(*each) for each in starts))


def test_what_the_client_has_holds_against_a_stage_that_says_other() -> None:
    tokens, starts = settle(7, 1, [5], [Held(9, True, (6,)), Held(9), Held(8, True, (6,))])
    assert tokens == (5,)
    assert [start.position for start in starts] == [0, 9, 0]


@pytest.mark.parametrize(
    ("can_replay", "work"),
    [(True, (3 * 10, 0)), (False, (3 * 10, 4 * 9))],
)
def test_only_a_stage_that_cannot_replay_computes_again(can_replay: bool, work: tuple[int, int]) -> None:
    held = (Held(9, can_replay, (1,)), Held(), Held(8, True, (1,)))
    _, starts = settle(3, 6, (), held)
    assert work_of((4, 3, 2), 10, held, starts) == work
