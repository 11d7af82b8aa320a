"""Sessions: two real ones with a fake ring between them, and a peer that sends everything but what is due."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from azu.errors import ProtocolError
from azu.identity import Identity
from azu.models.memory import chunk_rows
from azu.tickets import JobTicket
from azu.wire.messages import Chunk, Next, Resume, Token
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE, WEIGHT_FORMATS, DType, TensorHeader, WeightFormat
from azu.wire.tokens import pack_tokens
from node.session import StageSession

PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(1, 5)]
HIDDEN, VOCABULARY = 8, 50


def ticket(stages: int = 2, **changes: Any) -> JobTicket:
    fields: dict[str, Any] = {
        "job_id": b"j" * 16, "epoch": 0, "manifest": "c" * 64, "n_layers": stages,
        "stages": [{"peer_id": PEERS[index], "start": index, "end": index + 1} for index in range(stages)],
        "dtype": "float16", "prompt_tokens": 5, "max_tokens": 4, "stop_tokens": (), "sampling": {}, "price": 1,
        "begun_at": 0, "issued_at": 0, "expires_at": 1, "coordinator": PEERS[-1],
    }  # fmt: skip
    return JobTicket.model_validate(fields | changes)


def session(subject: JobTicket, index: int, hidden: int = HIDDEN) -> StageSession:
    return StageSession(subject, index, hidden_size=hidden, vocab_size=VOCABULARY)


def chunk(position: int, rows: int, sample: bool, *, dtype: DType = "float16", width: int = HIDDEN) -> Chunk:
    return Chunk(position=position, tensor=TensorHeader(dtype=dtype, shape=(rows, width)), sample=sample)


def accept(subject: StageSession, message: Chunk) -> int:
    return subject.accept_chunk(message, message.tensor.nbytes)


def ids(*tokens: int) -> bytearray:
    return bytearray(pack_tokens(tokens))


# --- chunks


@given(st.integers(1, 2**20), st.sampled_from(WEIGHT_FORMATS))
def test_a_chunk_has_a_row_at_least_and_is_bounded(hidden: int, dtype: WeightFormat) -> None:
    rows = chunk_rows(hidden, dtype)
    assert 1 <= rows <= 256
    assert rows == 1 or rows * hidden * ITEMSIZE[ACTIVATIONS[dtype]] <= 4_194_304


def test_max_body_is_what_a_full_chunk_has() -> None:
    subject = ticket(stages=3)
    assert session(subject, 0).max_body == 0
    for index in (1, 2):
        stage = session(subject, index)
        assert stage.max_body == chunk(0, stage.rows, False).tensor.nbytes


def test_who_needs_the_prompt() -> None:
    plain, penalised = ticket(stages=3), ticket(stages=3, sampling={"repetition_penalty": 1.1})
    assert [session(plain, index).needs_prompt for index in range(3)] == [True, False, False]
    assert [session(penalised, index).needs_prompt for index in range(3)] == [True, False, True]


# --- the prompt


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=600))
def test_a_prompt_comes_through_in_chunks_without_gap(prompt: list[int]) -> None:
    stage = session(ticket(prompt_tokens=len(prompt)), 0)
    accepted = stage.accept_prompt(ids(*prompt))
    chunks = list(stage.id_chunks(accepted))
    assert [token for part, _ in chunks for token in part] == prompt
    assert [sample for _, sample in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(1 <= len(part) <= stage.rows for part, _ in chunks)
    assert stage.position == len(prompt)


@pytest.mark.parametrize(
    "body", [b"", ids(1, 2, 3, 4), ids(1, 2, 3, 4, 5, 6), ids(1, 2, 3, 4, 5)[:-1], ids(1, 2, 3, 4, VOCABULARY),
             ids(2**32 - 1, 2, 3, 4, 5)]
)  # fmt: skip
def test_a_prompt_that_is_not_the_tickets_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError) as raised:
        session(ticket(), 0).accept_prompt(bytearray(body))
    assert raised.value.code == "bad_prompt"


# --- a whole job


class Ring:
    """Runs a job through real sessions; `tokens` are what the last stage would sample."""

    def __init__(self, subject: JobTicket, tokens: list[int], hidden: int = HIDDEN) -> None:
        self.ticket = subject
        self.stages = [session(subject, index, hidden) for index in range(len(subject.stages))]
        self.tokens = iter(tokens)
        self.hidden = hidden
        self.seen: list[list[int]] = [[] for _ in self.stages]  # positions that each stage ran
        self.emitted: list[Token] = []

    def run(self) -> list[Token]:
        first = self.stages[0]
        position = 0
        prompt = first.accept_prompt(ids(*[1] * self.ticket.prompt_tokens))
        told: Next | None = None
        for part, sample in first.id_chunks(prompt):
            told = self._pass_round(position, len(part), sample)
            position += len(part)
        while told is not None:
            position = first.position
            assert first.accept_next(told.index, told.token) == told.token
            told = self._pass_round(position, 1, sample=True)
        return self.emitted

    def _pass_round(self, position: int, rows: int, sample: bool) -> Next | None:
        self.seen[0] += range(position, position + rows)
        for stage, seen in zip(self.stages[1:], self.seen[1:], strict=True):
            message = chunk(position, rows, sample, width=self.hidden)
            assert accept(stage, message) == rows
            seen += range(position, position + rows)
        if not sample:
            return None
        token = self.stages[-1].sampled(next(self.tokens))
        self.emitted.append(token)
        return None if token.finish else Next(index=token.index, token=token.token)


@given(
    stages=st.integers(1, 4),
    prompt_tokens=st.integers(1, 700),
    max_tokens=st.integers(1, 12),
    stop_tokens=st.sets(st.integers(0, 9), max_size=3),
    tokens=st.lists(st.integers(0, 9), min_size=12, max_size=12),
    hidden=st.sampled_from([HIDDEN, 60_000, 3_000_000]),
)
def test_every_stage_runs_every_position_once_and_the_job_ends_when_it_should(
    stages: int, prompt_tokens: int, max_tokens: int, stop_tokens: set[int], tokens: list[int], hidden: int
) -> None:
    subject = ticket(stages, prompt_tokens=prompt_tokens, max_tokens=max_tokens, stop_tokens=tuple(sorted(stop_tokens)))
    ring = Ring(subject, tokens, hidden)
    emitted = ring.run()

    stop = next((index for index, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    count = min(max_tokens, stop + 1)
    assert [token.token for token in emitted] == tokens[:count]
    assert [token.index for token in emitted] == list(range(count))
    assert all(token.finish == "" for token in emitted[:-1])
    assert emitted[-1].finish == ("stop" if tokens[count - 1] in stop_tokens else "length")
    # The last token is sampled and never run.
    for stage, seen in zip(ring.stages, ring.seen, strict=True):
        assert seen == list(range(prompt_tokens + count - 1))
        assert stage.position == len(seen)


def test_a_job_in_a_single_stage_goes_on_after_its_first_token() -> None:
    assert [token.finish for token in Ring(ticket(stages=1), [3, 4, 5, 6]).run()] == ["", "", "", "length"]


# --- a job that goes on in the middle


def test_known_tokens_are_run_as_the_prompt_is_and_the_next_is_sampled_after_them() -> None:
    subject = ticket(stages=2, prompt_tokens=5, max_tokens=6)
    first = StageSession(subject, 0, hidden_size=1_000_000, vocab_size=VOCABULARY, known=2, position=3)
    last = StageSession(subject, 1, hidden_size=1_000_000, vocab_size=VOCABULARY, known=2, position=3)
    parts = list(first.id_chunks((1, 2, 3, 4, 5, 6, 7)))
    assert parts == [((4, 5), False), ((6, 7), True)]
    for position, (part, sample) in zip((3, 5), parts, strict=True):
        assert accept(last, chunk(position, len(part), sample, width=1_000_000)) == 2
    assert last.sampled(9) == Token(index=2, token=9)
    assert first.accept_next(2, 9) == 9
    assert accept(last, chunk(7, 1, True, width=1_000_000)) == 1
    assert last.sampled(9) == Token(index=3, token=9)


def resume(**changes: int) -> Resume:
    return Resume.model_validate({"epoch": 1, "position": 6, "send_from": 7, "known": 2} | changes)


def test_where_a_stage_may_be_told_to_go_on() -> None:
    """Five tokens of prompt and at most four more; the stage holds six positions."""
    first, middle, last = (session(ticket(stages=3), index) for index in range(3))
    assert first.accept_resume(resume(), ids(7, 8), 6) == last.accept_resume(resume(), ids(7, 8), 6) == (7, 8)
    assert middle.accept_resume(resume(), ids(), 6) == ()
    assert middle.accept_resume(resume(position=0, send_from=0, known=3), ids(), 6) == ()
    wrong = [{"position": 5}, {"position": 7}, {"position": 6, "known": 0}, {"send_from": 8}, {"known": 4}]
    for changes in wrong:
        with pytest.raises(ProtocolError) as raised:
            middle.accept_resume(resume(**changes), ids(), 6)
        assert raised.value.code == "bad_resume"
    for stage, body in ((first, ids(7)), (first, ids(7, VOCABULARY)), (last, ids()), (middle, ids(7, 8))):
        with pytest.raises(ProtocolError) as raised:
            stage.accept_resume(resume(), body, 6)
        assert raised.value.code == "bad_resume"


# --- what is out of turn


def test_only_what_is_due_is_accepted_at_every_step() -> None:
    """At each step of a job in its second stage, all other small chunks are refused and change nothing."""
    subject = ticket(prompt_tokens=3, max_tokens=3)
    stage = session(subject, 1)
    while True:
        fitting = []
        for position in range(8):
            for rows in range(1, 7):
                for sample in (False, True):
                    probe = session(subject, 1)
                    probe.position = stage.position
                    try:
                        accept(probe, chunk(position, rows, sample))
                        fitting.append((position, rows, sample))
                        assert probe.position == position + rows
                    except ProtocolError:
                        assert probe.position == stage.position
        at = stage.position
        if at < 3:  # in the prompt: any part of what is left of it, and sample at its end alone
            assert fitting == [(at, rows, at + rows == 3) for rows in range(1, 3 - at + 1)]
        elif at < 5:  # then one position at a time; the last token is never run
            assert fitting == [(at, 1, True)]
        else:
            assert fitting == []
            break
        accept(stage, chunk(*fitting[0]))


@pytest.mark.parametrize(
    ("message", "length"),
    [
        (chunk(0, 2, False, dtype="float32"), None),
        (chunk(0, 2, False, width=HIDDEN + 1), None),
        (chunk(0, 2, False), 31),
        (chunk(0, 2, False), 33),
        (chunk(0, 2, False), 0),
        (Chunk(position=0, tensor=TensorHeader(dtype="float16", shape=(16,)), sample=False), None),
        (Chunk(position=0, tensor=TensorHeader(dtype="float16", shape=(1, 2, HIDDEN)), sample=False), None),
        (Chunk(position=0, tensor=TensorHeader(dtype="float16", shape=(2**31, HIDDEN)), sample=False), None),
    ],
)
def test_tensors_that_are_not_the_jobs_are_refused(message: Chunk, length: int | None) -> None:
    stage = session(ticket(), 1)
    with pytest.raises(ProtocolError) as raised:
        stage.accept_chunk(message, message.tensor.nbytes if length is None else length)
    assert raised.value.code == "bad_tensor"
    assert stage.position == 0


def test_a_chunk_over_the_models_size_is_refused() -> None:
    stage = session(ticket(prompt_tokens=1_000), 1)
    with pytest.raises(ProtocolError):
        accept(stage, chunk(0, stage.rows + 1, False))
    assert accept(stage, chunk(0, stage.rows, False)) == stage.rows


def test_each_end_refuses_the_others_messages() -> None:
    first, middle, last = (session(ticket(stages=3), index) for index in range(3))
    with pytest.raises(ProtocolError):
        accept(first, chunk(0, 5, True))
    for stage in (middle, last):
        with pytest.raises(ProtocolError):
            stage.accept_next(0, 1)


def started(max_tokens: int = 3) -> StageSession:
    """A first stage that has run its prompt."""
    stage = session(ticket(max_tokens=max_tokens), 0)
    list(stage.id_chunks(stage.accept_prompt(ids(1, 2, 3, 4, 5))))
    return stage


def test_tokens_out_of_turn_are_refused_and_change_nothing() -> None:
    stage = started()
    for step in range(2):
        for index in {step - 1, step + 1, 7} - {-1}:
            with pytest.raises(ProtocolError) as raised:
                stage.accept_next(index, 1)
            assert raised.value.code == "bad_position"
        with pytest.raises(ProtocolError) as raised:
            stage.accept_next(step, VOCABULARY)
        assert raised.value.code == "bad_token"
        assert stage.accept_next(step, VOCABULARY - 1) == VOCABULARY - 1
    with pytest.raises(ProtocolError):  # max_tokens is 3: the third token is the last, and ends the job
        stage.accept_next(2, 1)
    assert stage.position == 5 + 2


def test_a_token_before_the_prompt_was_run_is_refused() -> None:
    stage = session(ticket(), 0)
    with pytest.raises(ProtocolError):
        stage.accept_next(0, 1)
    chunks = stage.id_chunks((1,) * 5)
    next(chunks)
    assert stage.accept_next(0, 1) == 1


def test_a_first_stage_that_is_behind_is_told_a_token_before_it_has_run_all_that_are_known() -> None:
    stage = StageSession(ticket(), 0, hidden_size=2**20, vocab_size=9, known=1, next_position=6)
    assert stage.accept_next(1, 2) == 2
    assert list(stage.id_chunks((1,) * 6)) == [((1, 1), False), ((1, 1), False), ((1, 1), True)]
    assert stage.position == 7


def test_a_job_of_one_token_takes_none_back() -> None:
    with pytest.raises(ProtocolError):
        started(max_tokens=1).accept_next(0, 1)


class Pipeline(RuleBasedStateMachine):
    """First and last stage with a ring that delays as it likes, and slips in what a broken peer might send."""

    @initialize(
        prompt=st.integers(1, 12), most=st.integers(1, 6), stop=st.sets(st.integers(0, 4), max_size=2).map(tuple)
    )
    def begin(self, prompt: int, most: int, stop: tuple[int, ...]) -> None:
        # Rows this wide travel two at a time, so that prompts come in several chunks.
        self.width = 1_000_000
        self.ticket = ticket(prompt_tokens=prompt, max_tokens=most, stop_tokens=stop)
        self.first, self.last = session(self.ticket, 0, self.width), session(self.ticket, 1, self.width)
        self.to_last: deque[Chunk] = deque()
        self.to_first: deque[Next] = deque()
        self.prompt = self.first.id_chunks((1,) * prompt)
        self.tokens: list[Token] = []

    def _forward(self, position: int, rows: int, sample: bool) -> None:
        self.to_last.append(chunk(position, rows, sample, width=self.width))

    @rule()
    def run_a_chunk_of_the_prompt(self) -> None:
        position = self.first.position
        for part, sample in self.prompt:
            self._forward(position, len(part), sample)
            break

    @precondition(lambda self: self.to_last)
    @rule(token=st.integers(0, 9))
    def deliver_a_chunk(self, token: int) -> None:
        message = self.to_last.popleft()
        accept(self.last, message)
        if message.sample:
            self.tokens.append(self.last.sampled(token))
            if not self.tokens[-1].finish:
                self.to_first.append(Next(index=self.tokens[-1].index, token=token))

    @precondition(lambda self: self.to_first)
    @rule()
    def deliver_a_token(self) -> None:
        position, told = self.first.position, self.to_first.popleft()
        self.first.accept_next(told.index, told.token)
        self._forward(position, 1, sample=True)

    @rule(position=st.integers(0, 20), rows=st.integers(1, 4), sample=st.booleans())
    def slip_in_a_chunk(self, position: int, rows: int, sample: bool) -> None:
        due = self.to_last[0] if self.to_last else None
        # A part of the prompt cut elsewhere is no fault that a stage could see.
        assume(position != self.last.position or self.last.position >= self.ticket.prompt_tokens or rows > 2)
        bad = chunk(position, rows, sample, width=self.width)
        assume(bad != due)
        # While the next token is on its way, the last stage cannot know that its chunk is forged.
        assume((position, rows, sample) != (self.last.position, 1, True))
        self._refused(lambda: accept(self.last, bad))

    @rule(index=st.integers(0, 8))
    def slip_in_a_token(self, index: int) -> None:
        assume(index != self.first.position - self.ticket.prompt_tokens)
        self._refused(lambda: self.first.accept_next(index, 1))

    def _refused(self, act: Any) -> None:
        before = (self.first.position, self.last.position)
        with pytest.raises(ProtocolError):
            act()
        assert (self.first.position, self.last.position) == before

    @invariant()
    def positions_stay_in_step(self) -> None:
        if not hasattr(self, "ticket"):
            return
        under_way = sum(message.tensor.shape[0] for message in self.to_last)
        assert self.first.position == self.last.position + under_way <= self.ticket.total_tokens - 1
        assert [token.index for token in self.tokens] == list(range(len(self.tokens)))
        assert len(self.tokens) <= self.ticket.max_tokens
        assert all(not token.finish for token in self.tokens[:-1])
        if self.last.position >= self.ticket.prompt_tokens:
            assert len(self.tokens) == self.last.position - self.ticket.prompt_tokens + 1


TestPipeline = Pipeline.TestCase
