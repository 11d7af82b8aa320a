"""Workers of one machine share its CPUs: while others compute, a pass takes one thread instead of all.

A pass with a thread for each CPU has some hundred parallel regions, each of which waits for the slowest thread; where
two such passes run at once, every region of either waits for the other. With one thread each they run side by side.
docs/performance.md measures it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from azu.logs import log

__all__ = ["Board", "Sharing", "turns_on"]

logger = logging.getLogger(__name__)

_SHM = Path("/dev/shm")  # noqa: S108 - a file of this user's alone, as `Board` sees to
_SLOTS, _SLOT_BYTES = 64, 8
# Who began a pass before that was stopped or killed in it.
_STALE_S = 10.0


class Board:
    """Who computes now: of each worker, when its pass began, in memory that they share. Kept until the process ends.

    Raises:
        OSError: the file cannot be used, or is not this user's alone, or has no place left.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(self._file)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise PermissionError(f"{path} is not this user's alone")
            os.ftruncate(self._file, _SLOTS * _SLOT_BYTES)
            self._mine = self._take_slot()
            self._memory = mmap.mmap(self._file, _SLOTS * _SLOT_BYTES)
        except BaseException:
            os.close(self._file)
            raise
        self._begun = memoryview(self._memory).cast("d")  # seconds of the machine's steady clock; 0: it does not
        self.end()

    def _take_slot(self) -> int:
        """A place that no living process has: the system gives its lock back when the process ends."""
        for slot in range(_SLOTS):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _SLOT_BYTES, slot * _SLOT_BYTES)
            except OSError:
                continue
            return slot
        raise OSError(f"{_SLOTS} workers share these CPUs already")

    def begin(self) -> int:
        """This worker begins a pass. Returns how many others are in one."""
        now = time.monotonic()
        self._begun[self._mine] = now
        others = (each for slot, each in enumerate(self._begun.tolist()) if slot != self._mine)
        return sum(0.0 <= now - each < _STALE_S for each in others)

    def end(self) -> None:
        """Its pass is over."""
        self._begun[self._mine] = 0.0


class Sharing:
    """Sets the device thread's number of threads for each pass. Used on that thread only.

    Args:
        cpus: which the worker may use.
        threads: of a pass that has them to itself.
    """

    def __init__(self, board: Board, cpus: set[int], threads: int) -> None:
        self._board = board
        self._cpus = cpus
        self._threads = self._in_use = threads
        self._own = cpus  # where the thread may run beside others of its team

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A pass."""
        others = self._board.begin()
        try:
            self._use(1 if others and len(self._cpus) < 2 * (1 + others) else self._threads)
            yield
        finally:
            self._board.end()

    def _use(self, threads: int) -> None:
        if threads == self._in_use:
            return
        if threads == 1:  # it may be bound to the same CPU as the other workers' (`openmp`)
            self._own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cpus if threads == 1 else self._own)
        torch.set_num_threads(threads)
        self._in_use = threads


def turns_on(device: str, threads: int) -> Callable[[], AbstractContextManager[None]]:
    """What makes the context of each pass on `device`: an empty one where there is nothing to share, or no way to."""
    if device != "cpu" or threads == 1 or not (_SHM.is_dir() and hasattr(os, "sched_getaffinity")):
        return nullcontext
    cpus = os.sched_getaffinity(0)
    # Workers that have been given different CPUs leave each other in peace.
    name = hashlib.sha256(repr(sorted(cpus)).encode()).hexdigest()[:16]
    try:
        board = Board(_SHM / f"azu-{os.geteuid()}-{name}")
    except OSError as error:
        log(logger, logging.DEBUG, "cannot tell who else computes on this machine", reason=str(error))
        return nullcontext
    return Sharing(board, cpus, threads).turn
