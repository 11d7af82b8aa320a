"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio
from quart import Request, Response

from azu.accounts.kept import KeptRequests
from azu.wire.messages import MAX_TOKENS
from coordinator.api.auth import Caller, Gate
from coordinator.api.bodies import Bodies
from coordinator.api.errors import ApiError, from_exception
from coordinator.api.jobs import ChatJob, Emit, Event, InFlight, generation_of, run_job
from coordinator.api.kept import Unclaimed, no_such_stream
from coordinator.api.noting import kept_job, taken_up_job
from coordinator.api.place import Place, parse_place
from coordinator.api.requests import ChatRequest, parse_chat_request
from coordinator.api.responses import Answer
from coordinator.api.results import Collected
from coordinator.api.settings import ApiSettings
from coordinator.api.stream import BUFFERED_EVENTS, EventBody, EventEncoder, produce, wait_for_first
from coordinator.api.till import Till
from coordinator.chat import ChatFormat
from coordinator.generation import GenerationRequest, GenerationService, ServedModel, new_job_id
from coordinator.journal import Asked, Kind, Unfinished

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
        journal: where requests are noted that outlive a restart.

    Attributes:
        unclaimed: those of before the last one.
        answer_once: gives the whole answer to a request that its client names by a key, however often it asks; None
            where nobody does.
    """

    def __init__(
        self,
        service: GenerationService,
        settings: ApiSettings,
        in_flight: InFlight,
        gate: Gate,
        till: Till | None = None,
        journal: KeptRequests | None = None,
    ) -> None:
        self._service = service
        self._settings = settings
        self.in_flight = in_flight
        self._gate = gate
        self._till = till
        self._journal = journal
        self.unclaimed = None if journal is None else self._unclaimed(journal)
        self.answer_once: Callable[[ChatJob, ChatRequest, str], Awaitable[dict[str, object]]] | None = None
        self._bodies = Bodies(settings)
        # Big prompts take seconds to parse and tokenise: not on the event loop, and not on every core either.
        self._limiter = trio.CapacityLimiter(settings.cpu_threads)
        self._formats: dict[str, ChatFormat] = {}  # by manifest digest, as many as are served

    async def answer(self, request: Request, nursery: trio.Nursery) -> Response | dict[str, object]:
        """The whole answer, or a stream whose job runs in `nursery`, the connection's own.

        Raises:
            ApiError: there is no answer.
        """
        if last_event_id := request.headers.get("Last-Event-ID"):
            return await self._go_on(request, parse_place(last_event_id), nursery)
        job, asked = await self.asked_for(request)
        answer = Answer(job.model)
        if asked.stream:
            include_usage = asked.stream_options is not None and asked.stream_options.include_usage
            job = self.kept(job, "stream", answer, include_usage=include_usage)
            return await self._stream(job, nursery, answer, include_usage=include_usage)
        key = request.headers.get("Idempotency-Key")
        if key and self.answer_once is not None:
            return await self.answer_once(job, asked, key)
        return await self._whole(self.kept(job, "whole", answer), answer)

    async def _go_on(self, request: Request, place: Place, nursery: trio.Nursery) -> Response:
        """A stream of before a restart from there on. The request's body, if any, is not looked at.

        Raises:
            ApiError: there is no such stream, or not any more.
        """
        caller = self._gate.claim(await self.identify(request), None)
        await self.read(request)
        if self.unclaimed is None or self._journal is None:
            raise no_such_stream()
        unfinished = await self.unclaimed.claim(place.stream, caller.wallet)
        try:
            job, asked = await self.taken_up(unfinished), unfinished.asked
        except BaseException:  # its client hung up, or its model is not served any more: others may go on with it
            with trio.CancelScope(shield=True):
                await self._journal.let_go(unfinished.lead)
            raise
        answer = Answer(job.model, asked.created)
        return await self._stream(job, nursery, answer, include_usage=asked.include_usage, read=place)

    def kept(self, job: ChatJob, kind: Kind, answer: Answer, *, include_usage: bool = False) -> ChatJob:
        """The job, to be noted while it runs, where there is a journal."""
        if self._journal is None:
            return job
        return kept_job(self._journal, job, kind, created=answer.created, include_usage=include_usage)

    async def taken_up(self, unfinished: Unfinished) -> ChatJob:
        """The job of a request of before the restart.

        Raises:
            ApiError: its model is not served any more.
        """
        asked, model = unfinished.asked, find_model(self._service, unfinished.asked.model_id)
        if self._journal is None or model.manifest.digest != asked.manifest:
            raise no_such_stream()
        return taken_up_job(self._journal, unfinished, model, await self._format(model))

    def _unclaimed(self, journal: KeptRequests) -> Unclaimed:
        def is_served(manifest: str) -> bool:
            return any(model.manifest.digest == manifest for model in self._service.models())

        give_up = partial(self._give_up, journal)
        unclaimed = Unclaimed(journal, is_served, give_up, lambda: self.in_flight.is_cut)
        end = partial(self._end, journal)
        unclaimed.handlers |= {"stream": end, "whole": end}
        return unclaimed

    async def _end(self, journal: KeptRequests, unfinished: Unfinished) -> None:
        """End the jobs of a request that nobody gets an answer to, and settle them for the tokens that their stages
        know.
        """
        job = await self.taken_up(unfinished)
        for number, standing in enumerate(unfinished.standings):
            if standing.ticket and standing.ended is None:
                async with generation_of(self._service, job, number) as generation:
                    await generation.finish()
        await self._give_up(journal, unfinished)

    async def _give_up(self, journal: KeptRequests, unfinished: Unfinished) -> None:
        """Forget a request; of its jobs that cannot be had any more nothing is charged."""
        await self.release(unfinished.asked)
        await journal.forget(unfinished.lead)

    async def release(self, asked: Asked) -> None:
        """Give back what is still put aside for the jobs of a request."""
        if self._till is not None:
            await self._till.release(asked.job_ids)

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

    @asynccontextmanager
    async def reserved(self, job: ChatJob) -> AsyncIterator[None]:
        """Have the jobs' highest cost put aside (see `Till.reserved`), and close the journal on them afterwards."""
        try:
            async with nullcontext() if self._till is None else self._till.reserved(job.requests, job.kept):
                yield
        finally:
            if job.kept is not None:
                with trio.CancelScope(shield=True):
                    await job.kept.close()

    async def run(self, job: ChatJob, emit: Emit) -> None:
        """Run jobs whose cost is put aside; see `run_job`."""
        await run_job(self._service, job, self._settings, self.in_flight, emit)

    async def _run_paid(self, job: ChatJob, emit: Emit) -> None:
        try:
            async with self.reserved(job):
                await self.run(job, emit)
        except Exception as error:  # the border, as in run_job: the ledger too may fail
            raise from_exception(error, self._settings) from error

    async def _whole(self, job: ChatJob, answer: Answer) -> dict[str, object]:
        collected = Collected(len(job.requests))
        await self._run_paid(job, collected.take)
        return collected.completion(answer)

    async def _stream(
        self, job: ChatJob, nursery: trio.Nursery, answer: Answer, *, include_usage: bool, read: Place | None = None
    ) -> Response:
        encoder = EventEncoder(
            answer,
            job.requests[0].job_id.hex(),
            len(job.requests),
            include_usage=include_usage,
            stream=job.kept.asked.request_id if job.kept is not None else "",
            read=read,
        )
        send, receive = trio.open_memory_channel[Event](BUFFERED_EVENTS)
        nursery.start_soon(produce, partial(self._run_paid, job), send)
        head = await wait_for_first(receive, self._settings.keep_alive_s)
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
