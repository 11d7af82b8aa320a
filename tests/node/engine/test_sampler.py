"""The sampler: against transformers' own processors, OpenAI's definition of penalties, and the odds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from azu.errors import ModelError
from azu.tickets import Sampling
from node.engine.sampler import Sampler, sample_pack

VOCABULARY = 40

seeds = st.integers(0, 10_000)


def logits_of(seed: int, size: int = VOCABULARY, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def draws(logits: torch.Tensor, count: int, **parameters: Any) -> list[int]:
    """First draws of `count` jobs that differ in their seed alone."""
    base = parameters.pop("seed", 0)
    jobs = (Sampler(Sampling(seed=base + number, **parameters)) for number in range(count))
    return [job.sample(logits) for job in jobs]


# --- greedy


@given(seeds)
def test_greedy_is_the_argmax(seed: int) -> None:
    logits = logits_of(seed)
    assert Sampler(Sampling()).sample(logits) == int(logits.argmax())
    # Cuts and the seed change nothing about it.
    cut = Sampling(top_k=3, top_p=0.1, min_p=0.5, seed=seed)
    assert Sampler(cut).sample(logits) == int(logits.argmax())


@given(seeds, st.sampled_from([1e-300, 1e-30, 1e-6, 1e-5, 1e-4]))
def test_a_tiny_temperature_is_as_good_as_greedy(seed: int, temperature: float) -> None:
    logits = logits_of(seed)
    assert Sampler(Sampling(temperature=temperature, seed=seed)).sample(logits) == int(logits.argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_any_dtype_are_left_as_they_were(dtype: torch.dtype, temperature: float) -> None:
    logits = logits_of(1).to(dtype)
    before = logits.clone()
    sampler = Sampler(
        Sampling(temperature=temperature, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5), (1, 2)
    )
    for _ in range(3):
        assert 0 <= sampler.sample(logits) < VOCABULARY
    assert torch.equal(logits, before)


# --- which tokens stay


def kept_by_transformers(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None].clone())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return {int(token) for token in torch.isfinite(scores[0]).nonzero().flatten()}


def kept_by_us(logits: torch.Tensor, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every token that some random number leads to: thousands of numbers, evenly spread and at the very ends."""
    points = [0.0, *(index / 4_000 for index in range(4_000)), 1.0 - 2.0**-53]
    drawn = iter(points)
    monkeypatch.setattr(Sampler, "_uniform", lambda _: next(drawn))
    jobs = [Sampler(sampling) for _ in points]
    return {picked.unwrap() for picked in sample_pack(jobs, logits.expand(len(points), -1))}


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 1}, {"top_k": 5}, {"top_k": 12}, {"top_k": 13}, {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.9},
        {"min_p": 0.02}, {"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 6, "top_p": 0.8}, {"top_k": 8, "min_p": 0.1},
        {"top_p": 0.95, "min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}, {},
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_same_tokens_stay_as_in_transformers(
    parameters: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twelve tokens none of which is rarer than the points that are tried are close together.
    logits = logits_of(7, size=12, spread=1.2)
    sampling = Sampling(temperature=temperature, **parameters)
    assert kept_by_us(logits, sampling, monkeypatch) == kept_by_transformers(logits, sampling)


@given(seeds, st.floats(0.3, 2.0), st.integers(0, VOCABULARY + 3), st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_no_draw_leaves_what_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(seed)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    # Where a token lies on the edge of top_p, rounding decides; transformers adds up from the other end.
    near = kept_by_transformers(logits, sampling.model_copy(update={"top_p": min(1.0, top_p + 1e-5)}))
    sampler = Sampler(sampling)
    assert {sampler.sample(logits) for _ in range(10)} <= near


def test_more_than_the_vocabulary_keeps_it_all() -> None:
    logits = torch.zeros(5)
    assert set(draws(logits, 200, temperature=1.0, top_k=2**31)) == set(range(5))


# --- how often


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.5}, {"temperature": 1.8}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(parameters: dict[str, Any]) -> None:
    """Chi-square over draws of many jobs, and over the steps of one; the seeds are fixed, so it never flickers."""
    logits = logits_of(11, size=12, spread=1.0)
    sampling = Sampling(**({"temperature": 1.0} | parameters))
    kept = torch.tensor(sorted(kept_by_transformers(logits, sampling)))
    expected = (logits[kept] / sampling.temperature).softmax(0)
    one_job = Sampler(sampling.model_copy(update={"seed": 99}))
    for tokens in (
        draws(logits, 4_000, **sampling.model_dump(exclude={"seed"})),
        [one_job.sample(logits) for _ in range(4_000)],
    ):
        observed = torch.bincount(torch.tensor(tokens), minlength=12)
        assert int(observed.sum()) == int(observed[kept].sum())
        statistic = float(((observed[kept] - 4_000 * expected) ** 2 / (4_000 * expected)).sum())
        freedom = len(kept) - 1
        assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 6  # about six sigma


def test_every_step_draws_anew() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    assert len({sampler.sample(torch.zeros(1_000)) for _ in range(50)}) > 40


# --- seeds


@given(seeds, st.integers(0, 2**63 - 1))
def test_the_same_seed_gives_the_same_tokens(seed: int, job_seed: int) -> None:
    sampling = Sampling(temperature=1.0, seed=job_seed, presence_penalty=0.5)
    one, other = Sampler(sampling), Sampler(sampling)
    steps = [logits_of(seed + step) for step in range(5)]
    assert [one.sample(step) for step in steps] == [other.sample(step) for step in steps]


def test_another_seed_gives_other_tokens() -> None:
    logits = torch.zeros(10_000)
    assert len(set(draws(logits, 50, temperature=1.0))) > 45


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    """Two jobs that saw other logits before draw alike at the same step: what taking a job over leans on."""
    flat = torch.zeros(10_000)
    one, other = (Sampler(Sampling(temperature=1.0, seed=5)) for _ in range(2))
    one.sample(logits_of(1, 10_000))
    other.sample(logits_of(2, 10_000))
    assert one.sample(flat) == other.sample(flat)


def test_the_random_numbers_are_these_on_every_machine() -> None:
    """Pinned: stages of different versions must continue each other's streams."""
    sampler = Sampler(Sampling(temperature=1.0, seed=42))
    assert [sampler.sample(torch.zeros(1_000)) for _ in range(4)] == [13, 987, 784, 613]


# --- penalties


@given(seeds, st.floats(0.2, 3.0), st.lists(st.integers(0, VOCABULARY - 1), max_size=6))
@settings(max_examples=50)
def test_the_repetition_penalty_is_transformers(seed: int, penalty: float, prompt: list[int]) -> None:
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    sampler = Sampler(Sampling(repetition_penalty=penalty), prompt)
    seen = list(prompt)
    for step in range(6):
        logits = logits_of(seed + step)
        scores = logits[None].clone()
        if seen:
            scores = processor(torch.tensor([seen]), scores)
        assert torch.allclose(sampler.penalised(logits), scores[0], rtol=1e-6)
        token = sampler.sample(logits)
        assert token == int(scores[0].argmax())
        seen.append(token)


@pytest.mark.parametrize("parameters", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_sampler_that_takes_a_job_over_goes_on_as_the_one_before_would(parameters: dict[str, Any]) -> None:
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}
    sampling = Sampling(seed=5, **penalties, **parameters)
    whole = Sampler(sampling, (1, 2))
    tokens = [whole.sample(logits_of(step)) for step in range(20)]
    later = Sampler(sampling, (1, 2), tokens[:11])
    assert [later.sample(logits_of(step)) for step in range(11, 20)] == tokens[11:]


def test_prompt_tokens_past_the_vocabulary_do_no_harm() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), (0, VOCABULARY, 2**31 - 1))
    logits = torch.zeros(VOCABULARY)
    logits[0], logits[1] = 3.0, 2.0
    assert sampler.sample(logits) == 1


@given(seeds, st.floats(-2.0, 2.0), st.floats(-2.0, 2.0))
@settings(max_examples=50)
def test_presence_and_frequency_penalties_are_openais(seed: int, presence: float, frequency: float) -> None:
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the output alone, not the prompt."""
    sampler = Sampler(Sampling(presence_penalty=presence, frequency_penalty=frequency), prompt=(1, 1, 2))
    counts = [0] * VOCABULARY
    for step in range(8):
        logits = logits_of(seed + step % 2, spread=1.0)
        expected = [
            value - count * frequency - (count > 0) * presence
            for value, count in zip(logits.tolist(), counts, strict=True)
        ]
        assert torch.allclose(sampler.penalised(logits), torch.tensor(expected), atol=1e-5)
        token = sampler.sample(logits)
        assert expected[token] >= max(expected) - 1e-5
        counts[token] += 1


def test_penalties_work_before_the_temperature() -> None:
    """A penalty of 2 at temperature 0.1 counts as 20: the second token wins for all but certain."""
    logits = torch.tensor([3.0, 2.0])
    for seed in range(50):
        sampler = Sampler(Sampling(temperature=0.1, presence_penalty=2.0, seed=seed))
        assert [sampler.sample(logits), sampler.sample(logits)] == [0, 1]


# --- damaged models


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad",
    [
        [math.nan] * 4, [1.0, math.nan, 2.0, 0.0], [math.nan, 9.0, 2.0, 0.0], [math.inf, 1.0, 2.0, 0.0],
        [-math.inf] * 4, [math.inf, -math.inf, math.nan, 0.0],
    ],
)  # fmt: skip
def test_logits_that_are_not_finite_are_an_error(bad: list[float], temperature: float) -> None:
    for extra in ({}, {"repetition_penalty": 1.3, "presence_penalty": 1.0}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ModelError) as raised:
            Sampler(Sampling(temperature=temperature, **extra), (1,)).sample(torch.tensor(bad))
        assert raised.value.code == "not_finite"


@pytest.mark.parametrize("parameters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_tokens_at_minus_infinity_are_never_drawn(parameters: dict[str, Any]) -> None:
    """Families mask parts of their padded vocabulary so."""
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 0.5, -math.inf])
    assert set(draws(logits, 100, temperature=2.0, **parameters)) == {1, 3}


# --- several jobs at once

parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.8]),
        "top_k": st.sampled_from([0, 0, 1, 5, VOCABULARY - 1, VOCABULARY + 3]),
        "top_p": st.sampled_from([1.0, 1.0, 0.3, 0.9, 0.999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, -0.4]),
        "seed": st.integers(0, 2**40),
    }
)


@given(st.lists(parameters, min_size=1, max_size=8), seeds)
def test_a_job_gets_the_token_that_it_gets_alone(jobs: list[dict[str, Any]], seed: int) -> None:
    together = [Sampler(Sampling(**each), (1, 2, 3)) for each in jobs]
    alone = [Sampler(Sampling(**each), (1, 2, 3)) for each in jobs]
    for step in range(4):
        logits = torch.stack([logits_of(seed + 100 * step + number) for number in range(len(jobs))])
        before = logits.clone()
        got = [each.unwrap() for each in sample_pack(together, logits)]
        assert torch.equal(logits, before)
        assert got == [sampler.sample(row) for sampler, row in zip(alone, logits, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 1_000, 49_152])
def test_of_equal_logits_a_greedy_job_takes_the_first_whoever_shares_its_pass(
    dtype: torch.dtype, vocabulary: int
) -> None:
    """In 16 bits many are equal."""
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(vocabulary)).to(dtype)
    logits[0, [vocabulary // 3, vocabulary // 2, vocabulary - 1]] = 60.0
    greedy, drawing = Sampling(temperature=0), Sampling(temperature=1, seed=5)
    alone = sample_pack([Sampler(greedy)], logits[:1])
    shared = sample_pack([Sampler(greedy), Sampler(drawing)], logits)
    assert alone[0].unwrap() == shared[0].unwrap() == vocabulary // 3


def test_damaged_logits_end_their_own_job_only() -> None:
    samplers = [Sampler(Sampling(temperature=temperature)) for temperature in (0.0, 1.0, 0.0, 1.0)]
    logits = torch.stack([logits_of(number) for number in range(4)])
    logits[1, 3] = math.nan
    logits[2] = -math.inf
    first, second, third, fourth = sample_pack(samplers, logits)
    assert first.unwrap() == int(logits[0].argmax())
    assert 0 <= fourth.unwrap() < VOCABULARY
    for each in (second, third):
        with pytest.raises(ModelError):
            each.unwrap()


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.9999])
def test_a_large_vocabulary_is_cut_as_a_whole_sort_would(spread: float, top_p: float) -> None:
    """Flat distributions keep more than the likeliest tokens that are sorted at first."""
    size = 5_000
    for seed in range(6):
        logits = logits_of(seed, size=size, spread=spread)
        sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=seed))
        ordered, tokens = logits.softmax(0).sort(descending=True)
        kept = ordered * ((ordered.cumsum(0) - ordered) < top_p)
        cumulated = kept.double().cumsum(0)
        point = cumulated[-1] * sampler._uniform()
        assert sampler.sample(logits) == int(tokens[torch.searchsorted(cumulated, point, right=True)])
