"""What the HTTP side and the swarm side of the coordinator know of each other.

The HTTP side turns a request into token ids and a `GenerationRequest`; the swarm side runs it through the stages and
hands back token ids and, at the end, who did what.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from azu.models.manifest import Manifest
from azu.tickets import JobTicket, Sampling
from coordinator.agreement import Handover

__all__ = [
    "Generation",
    "GenerationRequest",
    "GenerationService",
    "JobReport",
    "ModelHealth",
    "Note",
    "SampledToken",
    "ServedModel",
    "StageReport",
    "known_as",
    "new_job_id",
]


# Told the ticket in force, and of the stages that were left properly before; False where the job is led elsewhere now.
Note = Callable[[JobTicket, Sequence[Handover]], Awaitable[bool]]


def new_job_id() -> bytes:
    """A fresh job's id. Its last byte counts the chains that were tried for it, from 0."""
    return os.urandom(15) + b"\0"


def known_as(job_id: bytes) -> str:
    """How the client and the ledger know a job, whichever chain of workers a ticket's `job_id` is for."""
    return (job_id[:-1] + b"\0").hex()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A published model that this coordinator plans for."""

    manifest: Manifest
    tokenizer_files: dict[str, Path]  # as in Manifest.tokenizer, checked on disk
    config: dict[str, object]
    created: int  # unix seconds

    @property
    def model_id(self) -> str:
        return self.manifest.model_id


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """How well the swarm covers a model right now."""

    model_id: str
    covered: bool
    missing: tuple[tuple[int, int], ...]  # [start, end) ranges of layers that no live worker has loaded
    workers: int  # live workers with loaded layers of it


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One job for the swarm. `len(prompt) + max_tokens` never exceeds the model's context length.

    Args:
        account: jobs wait for room in turns of their accounts; "" is one account too.
        wallet: who pays; "" where use is free.
        key_id: the API key that it was asked with.
        job_id: under which the ledger knows it, see `new_job_id`.
        note: told by what the job can be taken up, after its first token and before each amendment. Where there is one,
            stages keep the job for a while when this coordinator goes away.
        leads: whether the job is still this coordinator's, asked before it is ended and settled.
        first_chain: the number of the first chain of workers that is tried: each has a job id of its own.
    """

    model: ServedModel
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    account: str = ""
    wallet: str = ""
    key_id: str | None = None
    job_id: bytes = field(default_factory=new_job_id)
    note: Note | None = field(default=None, compare=False, repr=False)
    leads: Callable[[], Awaitable[bool]] | None = field(default=None, compare=False, repr=False)
    first_chain: int = 0


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token id; `finish` is set on the last: "stop" (a stop token, this one) or "length"."""

    token: int
    finish: Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage did for a job, and what it earned; amounts in the chain's smallest unit."""

    peer_id: str
    start: int
    end: int
    tokens: int  # positions that went through its layers, of those that it is to be paid for
    token_layers: int
    earned: int
    state: Literal["credited", "held"]
    reason: str = ""  # why it is held, see `coordinator.agreement`
    against: tuple[str, ...] = ()  # whose word is against it, by peer id


@dataclass(frozen=True, slots=True)
class JobReport:
    """The meter's reading of one ended job."""

    job_id: str
    prompt_tokens: int
    completion_tokens: int
    token_layers: int
    cost: int
    stages: tuple[StageReport, ...]

    @property
    def credited(self) -> int:
        """What its workers earned."""
        return sum(stage.earned for stage in self.stages if stage.state == "credited")

    @property
    def held(self) -> int:
        """What is paid to nobody until the operator decides."""
        return sum(stage.earned for stage in self.stages if stage.state == "held")

    @property
    def platform(self) -> int:
        """What the platform keeps of the cost."""
        return self.cost - self.credited - self.held


class Generation(Protocol):
    """A running job. Leaving its context ends it in every stage, whatever the reason."""

    @property
    def job_id(self) -> str: ...

    def tokens(self) -> AsyncIterator[SampledToken]:
        """Token ids as they are sampled; ends after the one with `finish` set.

        Raises:
            NetworkError: a stage was lost.
        """

    async def finish(self) -> JobReport:
        """End the job in every stage (early if tokens are still coming), and return who did what."""

    def let_go(self) -> None:
        """Leave the job to its stages, which keep it for a while: leaving its context then ends nothing."""


class GenerationService(Protocol):
    """The swarm, as the HTTP side sees it."""

    def models(self) -> Sequence[ServedModel]: ...

    def health(self) -> Sequence[ModelHealth]: ...

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Start a job.

        Raises:
            CapacityError: code "model_not_covered" (message names the missing layers) or "no_capacity".
            NetworkError: a stage could not be reached or refused.
        """

    def take_up(
        self, request: GenerationRequest, ticket: JobTicket, handovers: Sequence[Handover]
    ) -> AbstractAsyncContextManager[Generation]:
        """Go on with a job that was let go, by what was noted last.

        Its tokens come from the first one on. Where no stage knows them any more, the loss comes instead.
        """
