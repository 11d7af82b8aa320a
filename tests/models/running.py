"""Runs a model in one piece and in stages, over the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from azu.models.splice import Stage, StageSpec, build_stage, stage_tensor_names
from tests.models.conftest import Published

__all__ = ["build", "in_stages", "one_by_one", "step_by_step", "tensors_of", "unsplit"]


def build(published: Published, start: int, end: int, dtype: torch.dtype = torch.float32) -> Stage:
    """A stage out of the published layer files that it needs, and no others."""
    spec = StageSpec(published.config, start, end, published.manifest.n_layers)
    _, shared = stage_tensor_names(spec)
    return build_stage(spec, dtype, "cpu", published.paths(start, end, shared))


def one_by_one(prompt: torch.Tensor, answer: torch.Tensor) -> list[torch.Tensor]:
    """A job's tokens as they come: the prompt at once, then one by one."""
    return [prompt, *answer.split(1)]


def unsplit(source: Path, parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [1, vocab] of the last token of each part, by transformers alone."""
    family = getattr(transformers, json.loads((source / "config.json").read_bytes())["architectures"][0])
    model: Any = family.from_pretrained(source, dtype=torch.float32)
    # What requires a gradient is multiplied in another order, and the file's mapping aligns weights otherwise.
    for parameter in model.requires_grad_(requires_grad=False).parameters():
        parameter.data = parameter.data.clone()
    arguments: dict[str, Any] = {"past_key_values": transformers.DynamicCache(config=model.config), "use_cache": True}
    logits: list[torch.Tensor] = []
    position = 0
    with torch.inference_mode():
        for part in parts:
            positions = torch.arange(position, position + len(part))[None]  # as `generate` gives them
            output = model(input_ids=part[None], position_ids=positions, logits_to_keep=1, **arguments)
            logits.append(output.logits[0, -1:])
            position += len(part)
    return logits


def in_stages(stages: list[Stage], parts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The same through a chain of stages."""
    return list(step_by_step(stages, parts))


def step_by_step(stages: list[Stage], parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """As `in_stages`, a part at a time, so that other jobs can run in between."""
    caches = [stage.new_cache() for stage in stages]
    position = 0
    for part in parts:
        hidden = part
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(hidden, cache, position)
        yield hidden
        position += len(part)


def tensors_of(stage: Stage) -> Iterator[torch.Tensor]:
    """All that the stage's modules hold, as parameters, buffers or otherwise."""
    for module in stage.model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            yield from (value for value in held.values() if isinstance(value, torch.Tensor))
