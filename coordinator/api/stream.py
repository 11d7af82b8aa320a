"""A streamed answer: events in, server-sent events out.

The job runs in a task of the connection's nursery, and the response's body only reads what it sends. So the body holds
no scope across a yield, and a client that hangs up cancels the nursery and with it the job.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self

import trio
from quart.wrappers.response import ResponseBody

from coordinator.api.errors import ApiError
from coordinator.api.jobs import Delta, Emit, Event, Failed, Finished, Started
from coordinator.api.place import Place, Read
from coordinator.api.responses import Answer
from coordinator.generation import JobReport

__all__ = ["EventBody", "EventEncoder", "produce", "wait_for_first"]

# No empty line follows: OpenAI's client takes one for an event without data, once an event has had an id.
KEEP_ALIVE = b": keep-alive\n"
# Tokens that wait for a slow reader before its job waits too.
BUFFERED_EVENTS = 64


async def produce(run: Callable[[Emit], Awaitable[None]], events: trio.MemorySendChannel[Event]) -> None:
    """Run a job and send its events; the last is `Failed` where it fails. Closes the channel."""
    async with events:
        try:
            await run(events.send)
        except ApiError as error:
            await events.send(Failed(error))


async def wait_for_first(events: trio.MemoryReceiveChannel[Event], timeout_s: float) -> list[Event]:
    """The events up to the first text, or those of `timeout_s` seconds: until then a failure can still be a status.

    Raises:
        ApiError: the job failed.
    """
    head: list[Event] = []
    with trio.move_on_after(timeout_s):
        async for event in events:
            if isinstance(event, Failed):
                raise event.error
            head.append(event)
            if not isinstance(event, Started):
                break
    return head


class EventEncoder:
    """Events to the bytes of OpenAI's stream; knows no time and does no IO.

    Args:
        job_id: in all chunks, however many choices.
        stream: what the ids of its events begin with, where it can be gone on with.
        read: what the client has of it already.
    """

    def __init__(
        self,
        answer: Answer,
        job_id: str,
        choices: int,
        *,
        include_usage: bool,
        stream: str = "",
        read: Place | None = None,
    ) -> None:
        self._answer = answer
        self._include_usage = include_usage
        self._reports: list[JobReport | None] = [None] * choices
        self._job_id = job_id
        self._place = Place(stream, (Read(),) * choices) if stream else None
        self._read = read
        self.ended = False

    def encode(self, event: Event) -> bytes:
        """The chunks of one event, none where the client has them; sets `ended` with the last."""
        match event:
            case Started(index):
                return self._placed(
                    index, "", self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
                )
            case Delta(index, text):
                return self._placed(index, text, self._chunk(index, {"content": text}))
            case Finished(index, reason, report):
                self._reports[index] = report
                last = self._placed(index, reason, self._chunk(index, {}, reason), is_last=True)
                return last if self.ended else last + self._end()
            case Failed():
                return self._fail(event.error)

    def _placed(self, index: int, text: str, chunk: bytes, *, is_last: bool = False) -> bytes:
        """A choice's chunk with its event's id. What ends the stream has none."""
        if self._place is None:
            return chunk
        self._place = self._place.after(index, text)
        now, read = self._place.of(index), Read() if self._read is None else self._read.of(index)
        if now.events > read.events:
            return f"id: {self._place}\n".encode() + chunk
        is_changed = is_last if now.events < read.events else now != read
        return self._fail(_changed()) if is_changed else b""

    def _fail(self, error: ApiError) -> bytes:
        # No [DONE]: nobody shall take this for a complete answer.
        self.ended = True
        return _frame(error.body())

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        chunk = self._answer.chunk(self._job_id, index, delta, reason)
        return _frame({**chunk, "usage": None} if self._include_usage else chunk)

    def _end(self) -> bytes:
        reports = [report for report in self._reports if report is not None]
        if len(reports) < len(self._reports):
            return b""
        self.ended = True
        usage = _frame(self._answer.usage_chunk(self._job_id, reports)) if self._include_usage else b""
        return usage + b"data: [DONE]\n\n"


class EventBody(ResponseBody):
    """The body of a streamed response: what came before it was made, then what comes."""

    def __init__(
        self,
        encoder: EventEncoder,
        head: Iterable[Event],
        events: trio.MemoryReceiveChannel[Event],
        keep_alive_s: float,
    ) -> None:
        self._encoder = encoder
        self._head = deque(head)
        self._events = events
        self._keep_alive_s = keep_alive_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # The channel is left to the nursery, which is cancelled next: closing it here would fail a job that sends.
        return None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with trio.move_on_after(self._keep_alive_s):
            while not self._encoder.ended:
                try:
                    event = self._head.popleft() if self._head else await self._events.receive()
                except trio.EndOfChannel:
                    break
                if encoded := self._encoder.encode(event):
                    return encoded
            raise StopAsyncIteration
        return KEEP_ALIVE


def _changed() -> ApiError:
    return ApiError(
        "The stream cannot be gone on with: workers were lost, and its text came out differently",
        status=502,
        code="stream_changed",
        remedy="Send the request again.",
    )


def _frame(value: dict[str, Any]) -> bytes:
    # ASCII: some clients take U+2028 or U+0085 for the end of a line.
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
