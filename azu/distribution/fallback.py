"""Where files come from that no peer has: the hub's repository that the model was published from."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable

import trio

from azu.distribution.progress import FetchProgress
from azu.errors import NetworkError
from azu.logs import log
from azu.models.manifest import Blob, Manifest
from azu.models.store import LayerStore

__all__ = ["hub_fallback"]

logger = logging.getLogger(__name__)

_LEAST_RATE, _GRACE_S = 35_000, 60.0  # bytes per second, as of a peer (Patience.piece), and what is on top of that


def hub_fallback(
    manifest: Manifest, store: LayerStore, progress: FetchProgress
) -> Callable[[Blob], Awaitable[int]] | None:
    """What `fetch_blobs` takes as its fallback; None where the model does not come from the hub."""
    return _Hub(manifest, store, progress).fetch if manifest.origin else None


class _Hub:
    def __init__(self, manifest: Manifest, store: LayerStore, progress: FetchProgress) -> None:
        from azu.models.hub_ranges import HubRanges  # huggingface_hub and its HTTP client: only where needed

        self._origin = manifest.origin
        self._progress = progress
        self._stopped = threading.Event()
        self._ranges = HubRanges(manifest, store, self._check)

    async def fetch(self, asked: Blob) -> int:
        blob = self._ranges.owner(asked)
        log(logger, logging.INFO, "no peer has a file, it comes from the hub", file=blob.digest[:12], repo=self._origin)
        with trio.move_on_after(_GRACE_S + blob.size / _LEAST_RATE):
            try:
                await trio.to_thread.run_sync(self._ranges.fetch, blob, abandon_on_cancel=True)
                return blob.size
            except trio.Cancelled:
                self._stopped.set()  # the thread ends with its next chunk, and tidies up
                raise
            finally:
                self._progress.coming = 0
        raise NetworkError(f"the hub sends {self._origin} too slowly", code="hub_unreachable")

    def _check(self, came: int) -> None:
        if self._stopped.is_set():
            raise NetworkError("the transfer from the hub was cancelled", code="cancelled")
        self._progress.coming = came
