"""Request bodies: bounded one by one in size and time, and all together in size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio
from quart import Request

from coordinator.api.errors import ApiError
from coordinator.api.settings import ApiSettings

__all__ = ["Bodies"]


class Bodies:
    """The bodies that are in memory right now; one for the app."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._held = 0

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """What one request holds; given back at the end of the block."""
        lease = Lease()
        try:
            yield lease
        finally:
            self._held -= lease.size

    async def read(self, request: Request, lease: Lease) -> bytes:
        """A request's JSON body.

        Raises:
            ApiError: it is no JSON by its header (415), too large (413), too slow (408), or one too many (503).
        """
        # Strictly: a web page of another origin can send any other type to a coordinator on loopback without being
        # asked.
        if not request.is_json:
            raise ApiError(
                f"The body's type is {(request.mimetype or 'unknown')[:100]}, not JSON",
                status=415,
                code="unsupported_media_type",
                remedy="Send the header Content-Type: application/json.",
            )
        data = bytearray()
        with trio.move_on_after(self._settings.body_timeout_s) as timeout:
            async for part in request.body:
                data += part
                lease.size += len(part)
                self._held += len(part)
                refusal = self._refusal(len(data))
                if refusal is not None:
                    data.clear()
                    await self.drain(request)
                    raise refusal
        if timeout.cancelled_caught:
            raise ApiError(
                f"The request's body did not arrive within {self._settings.body_timeout_s:.0f} s",
                status=408,
                code="request_timeout",
                remedy="Send it again.",
            )
        return bytes(data)

    def _refusal(self, size: int) -> ApiError | None:
        if size > self._settings.max_body_bytes:
            return ApiError(
                f"The request's body is larger than {self._settings.max_body_bytes} bytes",
                status=413,
                code="request_too_large",
                remedy="Send fewer or shorter messages.",
            )
        if self._held > self._settings.max_bodies_bytes:
            return ApiError(
                "Too many large requests arrive at once",
                status=503,
                code="no_capacity",
                remedy="Try again in a moment.",
                headers={"Retry-After": str(self._settings.busy_retry_s)},
            )
        return None

    async def drain(self, request: Request) -> None:
        """Read what is left of a refused request: a connection closed on unread data is reset, and nobody sees why."""
        with trio.move_on_after(self._settings.drain_s):
            async for _ in request.body:
                pass


class Lease:
    """How many bytes a request has brought."""

    def __init__(self) -> None:
        self.size = 0
