"""Cutting models while a coordinator runs, or beside it: one at a time, with progress that can be asked for.

`shard` is the work itself, for a thread; `run_shard` runs it in one that is let go when its caller is cancelled;
`ShardQueue` is what POST /models/shard puts into.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import trio

from azu.distribution import Library
from azu.errors import AzuError, CapacityError, InternalError
from azu.identity import Identity
from azu.logs import log
from azu.models.manifest import Manifest
from azu.models.progress import Progress, Report
from azu.models.publish import publish, publish_from_hub
from azu.models.published import is_whole
from coordinator.catalogue import Catalogue, Listed

__all__ = ["LoggedProgress", "Rate", "ShardQueue", "ShardStatus", "Sharder", "hold_lock", "run_shard"]

logger = logging.getLogger(__name__)

_MAX_QUEUED = 16
_MAX_REMEMBERED = 64  # ended jobs whose outcome can be asked for
_RATE_WINDOW_S = 5.0
_RATE_STEP_S = 0.1
_LOG_EVERY_S = 10.0
_LOCK_POLL_S = 0.2

State = Literal["queued", "downloading", "verifying", "cutting", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """Where the cutting of one model stands.

    Args:
        model_id: as it was asked for, "owner/name" or "owner/name@revision".
        progress: of the stage that `state` names; None while queued, at the end, and until that is known.
        rate: bytes per second of the last seconds, while downloading and verifying.
        manifest: where ready.
        error: where failed.
    """

    model_id: str
    state: State = "queued"
    progress: Progress | None = None
    rate: float | None = None
    manifest: Manifest | None = None
    error: AzuError | None = None


class Rate:
    """Bytes per second over the last seconds, of one stage at a time."""

    def __init__(self) -> None:
        self._stage = ""
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, progress: Progress, now: float) -> float | None:
        """The rate as of `now` in seconds; None where it is not yet known, or the stage does not count bytes."""
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._seen.clear()
        if not self._seen or now >= self._seen[-1][0] + _RATE_STEP_S:
            self._seen.append((now, progress.done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        counts_bytes = progress.stage in ("downloading", "verifying")
        return (progress.done - before) / (now - then) if counts_bytes and now > then else None


@dataclass(frozen=True, slots=True)
class Sharder:
    """What cutting a model takes: the publisher's key, where the files go, and where the result is listed."""

    identity: Identity
    library: Library
    catalogue: Catalogue
    data_dir: Path

    def cut(
        self,
        source: str,
        report: Report,
        *,
        only_hub: bool = False,
        admit: Callable[[str], None] = lambda _: None,
    ) -> Manifest:
        """Cut a model and sign its manifest; see `azu.models.publish.publish`. Blocks.

        Args:
            only_hub: take `source` for a hub's id even where there is a file of that name.
            admit: told the model's id before anything is downloaded or cut; what it raises ends the work.
        """
        with hold_lock(self.data_dir / "shard.lock", report):
            work = publish_from_hub if only_hub else publish
            manifest = work(source, self.library.store, report=report, admit=admit)
            self.library.publish(self.identity, manifest)
        return manifest

    def shard(self, source: str, report: Report, *, only_hub: bool = False) -> Manifest:
        """Cut a model as `cut` does, and list it in the catalogue.

        Raises:
            CapacityError: code "too_many_models", before its download and its cut.
        """
        manifest = self._list(source, report, only_hub)
        if is_whole(self.library.store, manifest):
            return manifest
        # Before it was listed, somebody removed a model that shares files with it. From now on these stay.
        return self._list(source, report, only_hub)

    def _list(self, source: str, report: Report, only_hub: bool) -> Manifest:
        manifest = self.cut(source, report, only_hub=only_hub, admit=self.catalogue.check_room)
        self.catalogue.add(Listed(manifest.model_id, manifest.digest))
        return manifest


async def run_shard(work: Callable[[Report], Manifest], report: Report) -> Manifest:
    """Run `work` in a thread. Cancelling returns at once, and the thread ends at its next report."""
    is_wanted = True

    def checked(progress: Progress) -> None:
        if not is_wanted:
            raise _Unwanted
        report(progress)

    try:
        return await trio.to_thread.run_sync(work, checked, abandon_on_cancel=True)
    finally:
        is_wanted = False


class _Unwanted(Exception):
    """Ends a thread whose caller has gone."""


class LoggedProgress:
    """A report that logs each stage, and how far it is every few seconds."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._rate = Rate()
        self._stage = ""
        self._logged = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        rate = self._rate.update(progress, now)
        if progress.stage == self._stage and now < self._logged + _LOG_EVERY_S:
            return
        self._stage, self._logged = progress.stage, now
        figures = {} if rate is None else {"bytes_per_s": round(rate)}
        log(logger, logging.INFO, progress.stage, model=self._model, file=progress.item, done=progress.done,
            total=progress.total, **figures)  # fmt: skip


class ShardQueue:
    """Cuts one model after another; `run` owns the work, the other methods never block.

    Args:
        work: cuts the model of that hub id, in a thread.
    """

    def __init__(self, work: Callable[[str, Report], Manifest]) -> None:
        self._work = work
        self._jobs: OrderedDict[str, ShardStatus] = OrderedDict()
        self._queue_in, self._queue = trio.open_memory_channel[str](_MAX_QUEUED)

    def submit(self, model_id: str) -> ShardStatus:
        """Queue a model; one that is queued or being cut already is not queued twice.

        Raises:
            CapacityError: code "no_capacity", where too many wait.
        """
        known = self._jobs.get(model_id)
        if known is not None and known.state not in ("ready", "failed"):
            return known
        try:
            self._queue_in.send_nowait(model_id)
        except trio.WouldBlock:
            problem = f"{_MAX_QUEUED} models are waiting to be cut"
            raise CapacityError(problem, remedy="Ask again when some of them are ready.") from None
        self._set(ShardStatus(model_id))
        return self._jobs[model_id]

    def status(self, model_id: str) -> ShardStatus | None:
        """What became of a model that was submitted; None where it never was, or long ago."""
        return self._jobs.get(model_id)

    async def run(self) -> None:
        """Cut what is submitted until cancelled."""
        async for model_id in self._queue:
            await self._run_one(model_id)

    async def _run_one(self, model_id: str) -> None:
        log(logger, logging.INFO, "sharding model", model=model_id)
        self._set(ShardStatus(model_id, "downloading"))  # it begins with what tells how much there is
        rate, log_progress = Rate(), LoggedProgress(model_id)

        def report(progress: Progress) -> None:  # in the thread; replacing a status is one step
            log_progress(progress)
            state: State = "queued" if progress.stage == "waiting" else progress.stage
            self._jobs[model_id] = ShardStatus(model_id, state, progress, rate.update(progress, time.monotonic()))

        try:
            manifest = await run_shard(partial(self._work, model_id), report)
            self._set(ShardStatus(model_id, "ready", manifest=manifest))
            log(logger, logging.INFO, "model sharded", model=manifest.model_id, manifest=manifest.digest)
        except Exception as error:  # a border: whatever a repository makes of the import, the next one may be better
            expected = isinstance(error, AzuError)
            log(logger, logging.ERROR, "model not sharded", model=model_id, exc_info=not expected, reason=str(error))
            failure = error if isinstance(error, AzuError) else InternalError("the coordinator failed to cut it")
            self._set(ShardStatus(model_id, "failed", error=failure))

    def _set(self, status: ShardStatus) -> None:
        self._jobs[status.model_id] = status
        self._jobs.move_to_end(status.model_id)
        ended = [job.model_id for job in self._jobs.values() if job.state in ("ready", "failed")]
        for model_id in ended[:-_MAX_REMEMBERED]:
            del self._jobs[model_id]


@contextmanager
def hold_lock(path: Path, report: Report) -> Iterator[None]:
    """Holds a lock that all processes which cut into one data folder take."""
    try:
        lock = path.open("w")
    except OSError as error:
        problem = f"{path} cannot be made: {error.strerror}"
        raise InternalError(problem, code="storage", remedy="Give --data-dir a writable folder.") from error
    with lock:
        while not _try_lock(lock.fileno()):
            report(Progress("waiting", "another process cuts a model into this data folder", 0, 0))
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
