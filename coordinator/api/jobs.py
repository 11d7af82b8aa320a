"""A request's way through the swarm: one job per choice, text out of its tokens, and events as they come.

Both kinds of answer, whole and streamed, are made of these events. Whoever calls `run_job` owns it: cancelling the call
leaves every job's context at once, which ends it in all stages.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

import trio

from azu.errors import NetworkError
from coordinator.api.errors import ApiError, from_exception, restarting, shutting_down
from coordinator.api.kept import Kept, replayed
from coordinator.api.settings import ApiSettings
from coordinator.chat import ChatFormat, StopStrings
from coordinator.generation import (
    Generation,
    GenerationRequest,
    GenerationService,
    JobReport,
    SampledToken,
    ServedModel,
)

__all__ = [
    "ChatJob",
    "Delta",
    "Emit",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "InFlight",
    "Started",
    "generation_of",
    "run_job",
]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ChatJob:
    """What a request asks of the swarm: one generation per choice. What may outlive a restart is `kept`."""

    model: ServedModel
    chat: ChatFormat
    requests: tuple[GenerationRequest, ...]
    stops: tuple[str, ...]
    kept: Kept | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The stages took the job of a choice."""

    index: int
    job_id: str


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of a choice; never empty."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is complete."""

    index: int
    reason: FinishReason
    report: JobReport


@dataclass(frozen=True, slots=True)
class Failed:
    """The job failed as a whole; nothing comes after it."""

    error: ApiError


Event = Started | Delta | Finished | Failed
Emit = Callable[[Event], Awaitable[None]]


class InFlight:
    """The jobs that run right now, so that a coordinator which stops can end them with a word, or let them go.

    is_cut: whether it stops.
    """

    def __init__(self) -> None:
        self.is_cut = False
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def scope(self) -> Iterator[trio.CancelScope]:
        """A scope for one job; that it was cut shows in its `cancelled_caught`."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    def cut(self) -> None:
        """End every job now."""
        self.is_cut = True
        for scope in tuple(self._scopes):
            scope.cancel()


async def run_job(
    service: GenerationService, job: ChatJob, settings: ApiSettings, in_flight: InFlight, emit: Emit
) -> None:
    """Run all choices at once and emit what they yield; where one fails the others are ended.

    Raises:
        ApiError: the answer cannot be given, or not to its end.
    """
    failures: list[ApiError] = []
    kept, is_complete = job.kept, False

    def is_let_go() -> bool:
        return kept is not None and not failures and kept.outlives(is_stopped=in_flight.is_cut)

    async def run_one(index: int) -> None:
        try:
            await _run_choice(service, job, index, is_let_go, emit)
        except Exception as error:  # the border: whatever it is becomes an answer
            failure = from_exception(error, settings)
            if failure.code == "tokens_lost" and kept is not None and kept.begins_anew(index):
                return await run_one(index)
            failures.append(failure)
            nursery.cancel_scope.cancel()

    try:
        with in_flight.scope() as scope:
            async with trio.open_nursery() as nursery:
                for index in range(len(job.requests)):
                    nursery.start_soon(run_one, index)
        is_complete = not scope.cancelled_caught
    finally:
        if kept is not None:
            kept.is_let_go = not is_complete and is_let_go()
    if failures:
        raise failures[0]
    if scope.cancelled_caught:
        raise restarting() if kept is not None and kept.is_let_go else shutting_down()


async def _run_choice(
    service: GenerationService, job: ChatJob, index: int, is_let_go: Callable[[], bool], emit: Emit
) -> None:
    async with generation_of(service, job, index) as generation:
        try:
            await emit(Started(index, generation.job_id))
            reason, tokens = await _emit_text(generation, job, index, emit)
        except trio.Cancelled:
            if is_let_go():
                generation.let_go()
            raise
        # Else a coordinator that stops in between would settle a job, and not know afterwards what came of it.
        with trio.CancelScope(shield=True):
            report = await generation.finish()
            if job.kept is not None:
                await job.kept.note_end(index, tokens, report)
    await emit(Finished(index, reason, report))


def generation_of(service: GenerationService, job: ChatJob, index: int) -> AbstractAsyncContextManager[Generation]:
    """A new job for a choice, or that of before the restart."""
    if job.kept is not None:
        standing = job.kept.standings[index]
        if standing.ended is not None:
            return replayed(standing.ended)
        if (ticket := standing.job_ticket()) is not None:
            return service.take_up(job.requests[index], ticket, [each.handover() for each in standing.left])
    return service.generate(job.requests[index])


async def _emit_text(
    generation: Generation, job: ChatJob, index: int, emit: Emit
) -> tuple[FinishReason, Sequence[SampledToken]]:
    """Emit a choice's text until it ends by itself or by a stop string; why it did, and its tokens."""
    detokenizer, stops = job.chat.detokenizer(), StopStrings(job.stops)
    came: list[SampledToken] = []
    async with _closing(generation.tokens()) as tokens:
        async for sampled in tokens:
            came.append(sampled)
            # A stop token is no part of the text, whether or not the tokenizer counts it as special.
            piece = "" if sampled.finish == "stop" else detokenizer.push(sampled.token)
            if sampled.finish:
                piece += detokenizer.flush()
            text = stops.push(piece)
            if sampled.finish:
                text += stops.flush()
            if text:
                await emit(Delta(index, text))
            if stops.matched:
                return "stop", came
            if sampled.finish:
                return sampled.finish, came
    raise NetworkError(
        "the last stage went silent before the answer was complete",
        code="stream_broken",
        remedy="Send the request again.",
    )


@asynccontextmanager
async def _closing(tokens: AsyncIterator[SampledToken]) -> AsyncGenerator[AsyncIterator[SampledToken]]:
    # An async generator that is left in its middle has to be closed by hand; other iterators have nothing to close.
    try:
        yield tokens
    finally:
        if isinstance(tokens, AsyncGenerator):
            await tokens.aclose()
