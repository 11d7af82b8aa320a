"""The unsplit model by transformers alone, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from benchmarks.asking import Answer
from tests.swarm.reference import Reference

__all__ = ["Unsplit"]


class _Clock(StoppingCriteria):
    """Notes when generate() has each token; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Unsplit:
    """The model out of a coordinator's published files."""

    def __init__(self, data_dir: Path, digest: str, dtype: torch.dtype) -> None:
        self._reference = Reference(data_dir, digest)
        self._model: Any = self._reference.model.to(dtype).requires_grad_(requires_grad=False)

    def generate(self, prompt: str, tokens: int) -> Answer:
        """One greedy answer."""
        clock = _Clock()
        ids = torch.tensor([self._reference.prompt_ids(prompt)])
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, pad_token_id=2, stopping_criteria=[clock],
            )  # fmt: skip
        return Answer(started, clock.times)

    def static_batch(self, prompts: Sequence[str], tokens: Sequence[int]) -> float:
        """All prompts in one generate(), padded to the longest: wanted tokens per second of all together, where each
        wants so many, and all go on until the last has its own.
        """
        ids = [self._reference.prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([[2] * (longest - len(each)) + each for each in ids])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids])
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                padded, attention_mask=mask, do_sample=False, min_new_tokens=max(tokens), max_new_tokens=max(tokens),
                pad_token_id=2,
            )  # fmt: skip
        return sum(tokens) / (time.perf_counter() - started)

    def continuous(self, prompts: Sequence[str], tokens: int) -> float:
        """The same by transformers' continuous batching."""
        ids = [self._reference.prompt_ids(prompt) for prompt in prompts]
        configure: Any = GenerationConfig
        settings = configure(
            do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=2, eos_token_id=-1,
            num_blocks=512, max_batch_tokens=512,
        )  # fmt: skip
        started = time.perf_counter()
        outputs = self._model.generate_batch(inputs=ids, generation_config=settings, progress_bar=False)
        seconds = time.perf_counter() - started
        made = sum(len(output.generated_tokens) for output in outputs.values())
        assert made == len(ids) * tokens, f"{made} tokens came"
        return made / seconds
