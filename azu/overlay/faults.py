"""Foreign exceptions become azu's, once, here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey

from azu.errors import AzuError, NetworkError

__all__ = ["acquire", "mapped", "reason", "settle", "shielded"]

_FOREIGN = (
    BaseLibp2pError,
    OSError,
    EOFError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    trio.EndOfChannel,
)
_FOREIGN_MODULES = ("libp2p", "multiaddr", "noise", "cryptography", "google.protobuf")


@contextmanager
def mapped(doing: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever libp2p raises into NetworkError("cannot <doing>: why").

    Its code is wrong_peer where another peer than the wanted one is there; its message then has the ids of both.
    azu's own errors, cancellation and exceptions that are plainly bugs of ours pass unchanged.
    """
    try:
        yield
    except AzuError:
        raise
    except Exception as error:
        if not _is_foreign(error):
            raise
        code = "wrong_peer" if isinstance(_innermost(error), PeerIDMismatchesPubkey) else None
        raise NetworkError(f"cannot {doing}: {reason(error)}", code=code, remedy=remedy) from error


def shielded(seconds: float) -> trio.CancelScope:
    """A scope for clean-up: outer cancellation stays out, `seconds` bound it."""
    return trio.CancelScope(shield=True, deadline=trio.current_time() + seconds)


async def acquire(lock: trio.Lock) -> None:
    """Take a lock without a trip through the scheduler where it is free; only the wait for it can be cancelled."""
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


def reason(error: BaseException) -> str:
    """The innermost cause as one line; libp2p buries "connection refused" four exceptions deep."""
    cause = _innermost(error)
    if isinstance(cause, trio.TooSlowError):
        return "no answer in time"
    return str(cause).split("\n", 1)[0] or type(cause).__name__


def _innermost(error: BaseException) -> BaseException:
    seen: BaseException = error
    for _ in range(10):
        if isinstance(seen, BaseExceptionGroup):
            seen = seen.exceptions[0]
            continue
        inner = seen.__cause__
        listed = getattr(inner if inner is not None else seen, "errors", None)
        if isinstance(listed, list) and listed and isinstance(listed[0], BaseException):
            inner = listed[0]
        if inner is None:
            break
        seen = inner
    return seen


def settle(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception that a group stands for: the only leaf, or the group itself."""
    leaves: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        each = todo.pop()
        if isinstance(each, BaseExceptionGroup):
            todo.extend(each.exceptions)
        elif not isinstance(each, trio.Cancelled):
            leaves.append(each)
    return leaves[0] if len(leaves) == 1 else group


def _is_foreign(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_foreign(each) for each in error.exceptions)
    return isinstance(error, _FOREIGN) or type(error).__module__.startswith(_FOREIGN_MODULES)
