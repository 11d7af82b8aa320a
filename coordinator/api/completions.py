"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio
from quart import Request, Response

from azu.wire.messages import MAX_TOKENS
from coordinator.api.auth import Caller, Gate
from coordinator.api.bodies import Bodies
from coordinator.api.errors import ApiError, from_exception
from coordinator.api.jobs import ChatJob, Delta, Emit, Event, Finished, InFlight, run_job
from coordinator.api.requests import ChatRequest, parse_chat_request
from coordinator.api.responses import Answer
from coordinator.api.settings import ApiSettings
from coordinator.api.stream import BUFFERED_EVENTS, EventBody, EventEncoder, produce, wait_for_first
from coordinator.api.till import Till
from coordinator.chat import ChatFormat
from coordinator.generation import GenerationRequest, GenerationService, ServedModel, new_job_id

__all__ = ["Completions", "find_model"]

T = TypeVar("T")

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


class Completions:
    """Answers chat completion requests; one for the app.

    Args:
        gate: who may ask.
        till: takes what answers cost; None where nobody keeps count.
    """

    def __init__(
        self,
        service: GenerationService,
        settings: ApiSettings,
        in_flight: InFlight,
        gate: Gate,
        till: Till | None = None,
    ) -> None:
        self._service = service
        self._settings = settings
        self._in_flight = in_flight
        self._gate = gate
        self._till = till
        self._bodies = Bodies(settings)
        # Big prompts take seconds to parse and tokenise: not on the event loop, and not on every core either.
        self._limiter = trio.CapacityLimiter(settings.cpu_threads)
        self._formats: dict[str, ChatFormat] = {}  # by manifest digest, as many as are served

    async def answer(self, request: Request, nursery: trio.Nursery) -> Response | dict[str, object]:
        """The whole answer, or a stream whose job runs in `nursery`, the connection's own.

        Raises:
            ApiError: there is no answer.
        """
        job, asked = await self.asked_for(request)
        if asked.stream:
            include_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return await self._stream(job, nursery, include_usage=include_usage)
        return await self._whole(job)

    async def asked_for(self, request: Request) -> tuple[ChatJob, ChatRequest]:
        """What a chat completion request asks of the swarm.

        Raises:
            ApiError: it may not, or makes no sense.
        """
        caller = self._gate.claim(await self.identify(request), None)
        with self._bodies.lease() as lease:
            body = await self._bodies.read(request, lease)
            most = self._settings.max_choices
            asked = await self._in_thread(lambda: parse_chat_request(body, max_choices=most))
            return await self.plan(asked, caller), asked

    async def identify(self, request: Request) -> Caller | None:
        """Who asks; see `Gate.identify`. Who may not gets to see why, however much they were about to send."""
        try:
            return await self._gate.identify(request, "inference")
        except ApiError:
            await self._bodies.drain(request)
            raise

    async def read(self, request: Request) -> bytes:
        """A body of another route that asks for an answer; see `Bodies.read`."""
        with self._bodies.lease() as lease:
            return await self._bodies.read(request, lease)

    async def plan(self, asked: ChatRequest, caller: Caller) -> ChatJob:
        """The jobs of a request.

        Raises:
            ApiError: there is no such model, or its context is too short.
        """
        model = find_model(self._service, asked.model)
        chat = await self._format(model)
        prompt = await self._in_thread(lambda: chat.encode(asked.template_messages()))
        return plan_job(asked, model, chat, prompt, self._settings, caller)

    def reserved(self, job: ChatJob) -> AbstractAsyncContextManager[None]:
        """Have the jobs' highest cost put aside; see `Till.reserved`."""
        return nullcontext() if self._till is None else self._till.reserved(job.requests)

    async def run(self, job: ChatJob, emit: Emit) -> None:
        """Run jobs whose cost is put aside; see `run_job`."""
        await run_job(self._service, job, self._settings, self._in_flight, emit)

    async def _run_paid(self, job: ChatJob, emit: Emit) -> None:
        try:
            async with self.reserved(job):
                await self.run(job, emit)
        except Exception as error:  # the border, as in run_job: the ledger too may fail
            raise from_exception(error, self._settings) from error

    async def _whole(self, job: ChatJob) -> dict[str, object]:
        texts = [""] * len(job.requests)
        finished: dict[int, Finished] = {}

        async def collect(event: Event) -> None:
            if isinstance(event, Delta):
                texts[event.index] += event.text
            elif isinstance(event, Finished):
                finished[event.index] = event

        await self._run_paid(job, collect)
        ends = [finished[index] for index in range(len(texts))]
        choices = [(text, end.reason) for text, end in zip(texts, ends, strict=True)]
        return Answer(job.model).completion(choices, [end.report for end in ends])

    async def _stream(self, job: ChatJob, nursery: trio.Nursery, *, include_usage: bool) -> Response:
        send, receive = trio.open_memory_channel[Event](BUFFERED_EVENTS)
        nursery.start_soon(produce, partial(self._run_paid, job), send)
        head = await wait_for_first(receive, self._settings.keep_alive_s)
        encoder = EventEncoder(Answer(job.model), len(job.requests), include_usage=include_usage)
        return Response(EventBody(encoder, head, receive, self._settings.keep_alive_s), headers=_STREAM_HEADERS)

    async def _format(self, model: ServedModel) -> ChatFormat:
        digest = model.manifest.digest
        if digest not in self._formats:
            self._formats[digest] = await self._in_thread(lambda: ChatFormat(model))
        return self._formats[digest]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)


def find_model(service: GenerationService, model_id: str) -> ServedModel:
    """The served model of that name.

    Raises:
        ApiError: status 404, naming those that are served.
    """
    models = {model.model_id: model for model in service.models()}
    if model_id not in models:
        available = ", ".join(sorted(models)) or "none yet"
        raise ApiError(
            f"The model '{model_id[:300]}' does not exist here",
            status=404,
            code="model_not_found",
            param="model",
            remedy=f"Available: {available}.",
        )
    return models[model_id]


def plan_job(
    asked: ChatRequest,
    model: ServedModel,
    chat: ChatFormat,
    prompt: tuple[int, ...],
    settings: ApiSettings,
    caller: Caller,
) -> ChatJob:
    """What to ask of the swarm.

    Raises:
        ApiError: code "context_length_exceeded".
    """
    context = min(model.manifest.context_length, MAX_TOKENS)
    wanted = asked.max_completion_tokens or asked.max_tokens
    _check_context(len(prompt), wanted, context)
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    request = GenerationRequest(
        model=model,
        prompt=prompt,
        max_tokens=wanted or min(settings.default_max_tokens, context - len(prompt)),
        sampling=asked.sampling(seed),
        stop_tokens=chat.stop_tokens,
        account=caller.turn,
        wallet=caller.wallet,
        key_id=caller.key_id,
    )
    # Choices differ by their seed alone.
    requests = tuple(
        replace(request, sampling=asked.sampling(seed + index), job_id=new_job_id()) for index in range(asked.n)
    )
    return ChatJob(model, chat, requests, tuple(asked.stop))


def _check_context(prompt: int, wanted: int | None, context: int) -> None:
    limit = f"This model's maximum context length is {context} tokens. However, "
    if prompt >= context:
        raise ApiError(
            f"{limit}your messages resulted in {prompt} tokens",
            code="context_length_exceeded",
            param="messages",
            remedy="Please reduce the length of the messages; at least one token has to be left for the answer.",
        )
    if wanted is not None and prompt + wanted > context:
        raise ApiError(
            f"{limit}you requested {prompt + wanted} tokens ({prompt} in the messages, {wanted} in the completion)",
            code="context_length_exceeded",
            param="messages",
            remedy=f"Please reduce the length of the messages or completion: it has {context - prompt} tokens left.",
        )
