"""How the last stage picks a token out of the logits.

The random number of a step is a function of the job's seed and the step's index alone, not of a generator's state: a
stage that takes a job over in the middle continues the same random stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from azu.errors import ModelError
from azu.tickets import Sampling

__all__ = ["Sampler"]

# Below this, dividing by the temperature overflows float32; the distribution is one-hot long before.
_GREEDY_BELOW = 1e-5


class Sampler:
    """The sampling state of one job.

    Args:
        sampling: the ticket's parameters.
        prompt: the prompt's token ids; only a repetition penalty looks at them.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._prompt = tuple(prompt)
        self._counts: torch.Tensor | None = None  # [vocab] float32, how often each token was sampled
        self._seen: torch.Tensor | None = None  # [vocab] bool, tokens of prompt and output
        self._index = 0

    def sample(self, logits: torch.Tensor) -> int:
        """Pick the next token.

        Args:
            logits: [vocab], any floating dtype, on any device. Not changed.

        Raises:
            ModelError: the logits are not finite, so the weights or an input must be damaged.
        """
        logits = self._penalised(logits.float())
        peak = logits.max()
        if not bool(torch.isfinite(peak)):
            raise ModelError("the model's output is not finite", code="not_finite", remedy="Try --dtype float32")
        if self._sampling.temperature < _GREEDY_BELOW:
            token = int(logits.argmax())
        else:
            token = self._draw((logits - peak) / self._sampling.temperature)
        self._count(token)
        self._index += 1
        return token

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros_like(logits, dtype=torch.bool)
                known = torch.tensor(self._prompt, dtype=torch.int64, device=logits.device)
                self._seen[known[known < len(logits)]] = True
            factor = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._seen, penalised, logits)
        if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            logits = logits - self._counts * sampling.frequency_penalty
            logits = logits - (self._counts > 0).float() * sampling.presence_penalty
        return logits

    def _count(self, token: int) -> None:
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def _draw(self, logits: torch.Tensor) -> int:
        """Draw from softmax(logits) cut by top_k, then top_p, then min_p (the order of transformers)."""
        sampling = self._sampling
        tokens: torch.Tensor | None = None
        if 0 < sampling.top_k < len(logits):
            logits, tokens = logits.topk(sampling.top_k)  # sorted, descending
        elif sampling.top_p < 1.0:
            logits, tokens = logits.sort(descending=True)
        weights = logits.softmax(0)
        if sampling.top_p < 1.0:
            # A token stays while the mass before it is below top_p, so that the first always stays.
            weights = weights * ((weights.cumsum(0) - weights) < sampling.top_p)
        if sampling.min_p > 0.0:
            weights = weights * (weights >= sampling.min_p * weights.max())
        # float64, since the sum over a large vocabulary in float32 drifts by more than a rare token's mass.
        cumulated = weights.double().cumsum(0)
        point = cumulated[-1] * self._uniform()
        position = int(torch.searchsorted(cumulated, point, right=True).clamp(max=len(cumulated) - 1))
        return position if tokens is None else int(tokens[position])

    def _uniform(self) -> float:
        """A number in [0, 1) that follows from the job's seed and this step's index."""
        key = self._sampling.seed.to_bytes(8, "little") + self._index.to_bytes(8, "little")
        bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11
        return math.ldexp(bits, -53)
