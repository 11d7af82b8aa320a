"""OpenAI's response objects, as plain values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.api.amounts import amount_out
from coordinator.generation import JobReport, ModelHealth, ServedModel, StageReport

__all__ = ["Answer", "health_object", "model_object", "range_text", "usage_object"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The fields that all objects of one answer share."""

    model: ServedModel
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, choices: Sequence[tuple[str, str]], reports: Sequence[JobReport]) -> dict[str, Any]:
        """A whole answer; `choices` are texts and finish reasons, by index."""
        return {
            **self._head(reports[0].job_id, "chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                    "logprobs": None,
                    "finish_reason": reason,
                }
                for index, (text, reason) in enumerate(choices)
            ],
            "usage": usage_object(reports),
        }

    def chunk(self, job_id: str, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head(job_id, "chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, job_id: str, reports: Sequence[JobReport]) -> dict[str, Any]:
        """The last piece of a streamed answer whose client asked for usage."""
        head = self._head(job_id, "chat.completion.chunk")
        return {**head, "choices": [], "usage": usage_object(reports)}

    def _head(self, job_id: str, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{job_id}",
            "object": kind,
            "created": self.created,
            "model": self.model.model_id,
            # What answers: equal seeds can only give equal text where this is equal.
            "system_fingerprint": f"azu-{self.model.manifest.digest[:12]}",
        }


def usage_object(reports: Sequence[JobReport]) -> dict[str, Any]:
    """Tokens as OpenAI counts them (a prompt once, however many choices), and what the swarm did under "azu"."""
    prompt = reports[0].prompt_tokens
    completion = sum(report.completion_tokens for report in reports)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "azu": {
            "job_id": reports[0].job_id,
            "token_layers": sum(report.token_layers for report in reports),
            "cost": amount_out(sum(report.cost for report in reports)),
            "stages": [_stage_object(stage) for report in reports for stage in report.stages],
        },
    }


def model_object(model: ServedModel) -> dict[str, Any]:
    """An entry of GET /v1/models."""
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "azu",
        "context_length": model.manifest.context_length,
    }


def health_object(health: ModelHealth) -> dict[str, Any]:
    """An entry of GET /healthz; ranges of layers are [start, end)."""
    missing = range_text(health.missing)
    return {
        "id": health.model_id,
        "covered": health.covered,
        "workers": health.workers,
        "missing": [list(span) for span in health.missing],
        "message": f"no live worker has layers {missing}; more workers have to join" if missing else "",
    }


def range_text(ranges: Sequence[tuple[int, int]]) -> str:
    """[start, end) ranges in words that people use: "0-9, 12"."""
    return ", ".join(f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in ranges)


def _stage_object(stage: StageReport) -> dict[str, Any]:
    return {
        "peer_id": stage.peer_id,
        "layers": [stage.start, stage.end],
        "tokens": stage.tokens,
        "token_layers": stage.token_layers,
        "earned": amount_out(stage.earned),
        "state": stage.state,
        **({"reason": stage.reason} if stage.reason else {}),
    }
