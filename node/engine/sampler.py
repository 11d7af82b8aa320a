"""How the last stage picks a token out of the logits.

The random number of a step is a function of the job's seed and the step's index alone, not of a generator's state: a
stage that takes a job over in the middle continues the same random stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import outcome
import torch

from azu.errors import ModelError
from azu.tickets import Sampling

__all__ = ["Sampler", "sample_pack"]

# Of a vocabulary, so many of the likeliest tokens are sorted first: nearly always top_p keeps fewer, and sorting all of
# a large vocabulary takes as long as a layer.
_LIKELIEST = 1_024
# Below this, dividing by the temperature overflows float32; the distribution is one-hot long before.
_GREEDY_BELOW = 1e-5


class Sampler:
    """The sampling state of one job.

    Args:
        sampling: the ticket's parameters.
        prompt: the prompt's token ids; only a repetition penalty looks at them.
        output: tokens that were sampled before, by whichever worker.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = (), output: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self._prompt = tuple(prompt)
        self._output = tuple(output)
        self._counts: torch.Tensor | None = None  # [vocab] float32, how often each token was sampled
        self._seen: torch.Tensor | None = None  # [vocab] bool, tokens of prompt and output
        self._index = len(self._output)

    def sample(self, logits: torch.Tensor) -> int:
        """Pick the next token of this job alone.

        Args:
            logits: [vocab], any floating dtype, on any device. Not changed.

        Raises:
            ModelError: the logits are not finite, so the weights or an input must be damaged.
        """
        [picked] = sample_pack([self], logits.unsqueeze(0))
        return picked.unwrap()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature < _GREEDY_BELOW

    def penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """[vocab] float32 with the job's penalties."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros_like(logits, dtype=torch.bool)
                known = torch.tensor(self._prompt + self._output, dtype=torch.int64, device=logits.device)
                self._seen[known[known < len(logits)]] = True
            factor = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._seen, penalised, logits)
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
                before = torch.tensor(self._output, dtype=torch.int64, device=logits.device)
                self._counts += torch.bincount(before, minlength=len(logits))[: len(logits)]
            logits = logits - self._counts * sampling.frequency_penalty
            logits = logits - (self._counts > 0).float() * sampling.presence_penalty
        return logits

    @property
    def has_penalties(self) -> bool:
        """Whether `penalised` changes anything."""
        sampling = self.sampling
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)

    def note(self, token: int) -> None:
        """Count a token that was picked."""
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True
        self._index += 1

    def _uniform(self) -> float:
        """A number in [0, 1) that follows from the job's seed and this step's index."""
        key = self.sampling.seed.to_bytes(8, "little") + self._index.to_bytes(8, "little")
        bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11
        return math.ldexp(bits, -53)


def sample_pack(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[outcome.Outcome[int]]:
    """Pick the next token of several jobs at once; what a job gets does not depend on the others.

    Args:
        logits: [jobs, vocab], any floating dtype, on any device. Not changed.

    Returns:
        Each job's token, or the ModelError, code "not_finite", of one whose logits are damaged.
    """
    if not all(each.is_greedy and not each.has_penalties for each in samplers):
        logits = logits.float()
    penalised = [index for index, each in enumerate(samplers) if each.has_penalties]
    if penalised:
        rows = torch.stack([samplers[index].penalised(logits[index]) for index in penalised])
        logits = logits.index_copy(0, torch.tensor(penalised, device=logits.device), rows)
    peaks, likeliest = logits.max(-1)
    tokens = likeliest.tolist()
    damaged = (~torch.isfinite(peaks)).tolist()
    drawing = [index for index, each in enumerate(samplers) if not each.is_greedy and not damaged[index]]
    for cut in (True, False):  # jobs that need the tokens in order, and jobs that do not
        group = [index for index in drawing if _is_cut(samplers[index].sampling, logits.shape[1]) == cut]
        if group:
            chosen = [samplers[index] for index in group]
            scores = (logits[group] - peaks[group].unsqueeze(1)) / _column(
                [each.sampling.temperature for each in chosen], logits
            )
            drawn = _draw_ordered(chosen, scores) if cut else _draw(chosen, scores.softmax(-1))
            for index, token in zip(group, drawn, strict=True):
                tokens[index] = token
    return [_noted(*each) for each in zip(samplers, tokens, damaged, strict=True)]


def _noted(sampler: Sampler, token: int, is_damaged: bool) -> outcome.Outcome[int]:
    if is_damaged:
        return outcome.Error(
            ModelError("the model's output is not finite", code="not_finite", remedy="Try --dtype float32")
        )
    sampler.note(token)
    return outcome.Value(token)


def _is_cut(sampling: Sampling, vocabulary: int) -> bool:
    return 0 < sampling.top_k < vocabulary or sampling.top_p < 1.0


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).to(like.dtype).unsqueeze(1)


def _draw_ordered(samplers: Sequence[Sampler], scores: torch.Tensor) -> list[int]:
    """Draw from softmax(scores) cut by top_k, then top_p, then min_p (the order of transformers)."""
    vocabulary = scores.shape[1]
    limits = [min(each.sampling.top_k or vocabulary, vocabulary) for each in samplers]
    count = min(vocabulary, max(each if each < vocabulary else _LIKELIEST for each in limits))
    ordered, tokens = scores.topk(count)  # descending
    tops = _column([each.sampling.top_p for each in samplers], scores)
    ranks = torch.arange(count, device=scores.device)
    kept = torch.where(ranks < torch.tensor(limits, device=scores.device).unsqueeze(1), ordered, float("-inf"))
    whole = torch.tensor([limit == vocabulary for limit in limits], device=scores.device).unsqueeze(1)
    norm = torch.where(whole, scores.logsumexp(1, keepdim=True), kept.logsumexp(1, keepdim=True))
    weights = (kept - norm).exp()
    before = weights.cumsum(1) - weights
    if count < vocabulary and bool((whole & (before[:, -1:] < tops)).any()):  # a flat distribution: top_p keeps more
        return _draw_each_whole(samplers, scores)
    # A token stays while the mass before it is below top_p, so that the first always stays.
    positions = _draw(samplers, weights * (before < tops))
    return tokens[torch.arange(len(samplers)), positions].tolist()


def _draw_each_whole(samplers: Sequence[Sampler], scores: torch.Tensor) -> list[int]:
    """The same over the whole vocabulary in order."""
    drawn: list[int] = []
    for sampler, row in zip(samplers, scores, strict=True):
        ordered, tokens = row.sort(descending=True)
        if sampler.sampling.top_k:
            ordered = ordered[: sampler.sampling.top_k]
        weights = ordered.softmax(0)
        weights = weights * ((weights.cumsum(0) - weights) < sampler.sampling.top_p)
        [position] = _draw([sampler], weights.unsqueeze(0))
        drawn.append(int(tokens[position]))
    return drawn


def _draw(samplers: Sequence[Sampler], weights: torch.Tensor) -> list[int]:
    """Positions drawn by weights [jobs, n], of which min_p cuts those that are far below the largest."""
    least = _column([each.sampling.min_p for each in samplers], weights)
    weights = weights * (weights >= least * weights.max(-1, keepdim=True).values)
    # float64, since the sum over a large vocabulary in float32 drifts by more than a rare token's mass.
    cumulated = weights.double().cumsum_(-1)  # in place: it is the largest of all
    points = torch.tensor([[each._uniform()] for each in samplers], dtype=torch.float64, device=weights.device)
    found = torch.searchsorted(cumulated, cumulated[:, -1:] * points, right=True)
    return found.squeeze(1).clamp(max=weights.shape[1] - 1).tolist()
