"""A stage's line to its job's coordinator: one job stream, and another one where the coordinator comes back to the job.

What is said while there is no stream is dropped: a coordinator that is back has the job paused, and is told what the
stage holds.
"""

from __future__ import annotations

import logging

import trio

from azu.channel import Channel
from azu.errors import NetworkError
from azu.logs import log
from azu.wire.frames import Buffer
from azu.wire.messages import SILENCE_S, Message

__all__ = ["Line"]

logger = logging.getLogger(__name__)


class Line:
    """One job's. Whoever handles a stream keeps it open until the line has left it.

    Args:
        keep_s: seconds for which the coordinator may be away.
    """

    def __init__(self, channel: Channel, keep_s: float) -> None:
        self._channel: Channel | None = channel
        self._keep_s = keep_s
        self._is_given_up = False
        self._reading = trio.CancelScope()
        self._changed = trio.Event()  # set when another stream is in use, or none, and then replaced

    @property
    def is_up(self) -> bool:
        """Whether there is a stream."""
        return self._channel is not None

    async def send(self, message: Message, body: Buffer = b"") -> None:
        """Say something, if there is a stream."""
        if self._channel is None:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._channel.send(message, body)
        except NetworkError as error:  # receive() sees the same end
            log(logger, logging.DEBUG, "coordinator not told", reason=error.message)

    async def receive(self) -> tuple[Message, bytearray] | None:
        """The next message; None where the stream is gone.

        Raises:
            ProtocolError: the bytes are no messages.
        """
        while True:
            channel, received = self._channel, None
            if channel is None:
                return None
            with trio.CancelScope() as self._reading, trio.move_on_after(SILENCE_S):
                try:
                    received = await channel.receive()
                except NetworkError as error:
                    log(logger, logging.DEBUG, "job stream broke", reason=error.message)
            if channel is self._channel:
                if received is None:
                    self._use(None)
                return received

    async def until_back(self) -> None:
        """Wait for another stream.

        Raises:
            NetworkError: none came in time, or it was given up.
        """
        with trio.move_on_after(self._keep_s):
            while self._channel is None and not self._is_given_up:
                await self._changed.wait()
        if self._channel is None:
            raise NetworkError("the coordinator is away, and does not come back to this job", code="coordinator_lost")

    def give_up(self) -> None:
        """Wait for no other stream."""
        self._is_given_up = True
        self._use(self._channel)

    def move(self, channel: Channel) -> None:
        """Go on in another stream."""
        self._use(channel)
        self._reading.cancel()

    def close(self) -> None:
        """Leave the stream in use."""
        self._use(None)

    async def changed(self) -> None:
        """Wait until another stream is in use, or none."""
        await self._changed.wait()

    async def until_left(self, channel: Channel) -> None:
        """Wait until a stream is of no use any more."""
        while self._channel is channel:
            await self._changed.wait()

    def _use(self, channel: Channel | None) -> None:
        self._channel = channel
        self._changed.set()
        self._changed = trio.Event()
