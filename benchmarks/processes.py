"""Processes of a benchmark's own that it starts, asks things, freezes and kills.

They are forked from one that has everything imported: importing torch in each would take longer than all the rest. Who
starts them must do so under `if __name__ == "__main__"`, or in a test.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from multiprocessing.connection import Connection
from typing import Any

import trio

from azu.errors import AzuError, NetworkError
from tests.netlab import Host

__all__ = ["GoneError", "Process", "Start", "open_processes"]

Start = Callable[..., "Process"]


class GoneError(Exception):
    """The process that was asked has ended, or was killed by us."""


class Process:
    """One process, made by what `open_processes` gives. Inside, `kind(nursery, *arguments)` has the methods."""

    def __init__(self, kind: type, arguments: tuple[Any, ...], host: Host | None) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, kind, arguments, host), daemon=True)
        self._process.start()
        theirs.close()
        self._numbers = itertools.count()
        self._waiting: dict[int, trio.Event] = {}
        self._answers: dict[int, tuple[Any, str]] = {}
        self._gone = False

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Have a method run there, beside those that are running.

        Raises:
            GoneError: the process has ended. NetworkError: what went wrong there.
        """
        number, event = next(self._numbers), trio.Event()
        self._waiting[number] = event
        try:
            if not self._gone:
                self._pipe.send((number, method, arguments))
                await event.wait()
        except OSError as error:
            raise GoneError from error
        finally:
            del self._waiting[number]
        if number not in self._answers:
            raise GoneError
        result, fault = self._answers.pop(number)
        if fault:
            raise NetworkError(fault)
        return result

    def kill(self, *, freeze: bool = False) -> None:
        """End it without a word by SIGKILL; or freeze it by SIGSTOP: the kernel takes connections, nobody answers."""
        assert self._process.pid is not None
        self._end()
        os.kill(self._process.pid, signal.SIGSTOP if freeze else signal.SIGKILL)

    def _end(self) -> None:
        self._gone = True
        for event in self._waiting.values():
            event.set()

    async def _read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._pipe.fileno())
            try:
                number, result, fault = self._pipe.recv()
            except (EOFError, OSError):
                assert self._gone, "a process ended by itself; its error is above"
                return
            if number in self._waiting:
                self._answers[number] = result, fault
                self._waiting[number].set()

    def _close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


@asynccontextmanager
async def open_processes(*preload: str) -> AsyncIterator[Start]:
    """`start(kind, *arguments, host=None)`: a Process, in a host of the network laboratory if one is given. They all
    end with the context. `preload` names the modules that are imported once for all.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    started: list[Process] = []
    try:
        async with trio.open_nursery() as nursery:

            def start(kind: type, *arguments: Any, host: Host | None = None) -> Process:
                started.append(Process(kind, arguments, host))
                nursery.start_soon(started[-1]._read)
                return started[-1]

            yield start
            nursery.cancel_scope.cancel()
    finally:
        for process in started:
            process._close()


def _main(pipe: Connection, kind: type, arguments: tuple[Any, ...], host: Host | None) -> None:
    logging.disable(logging.WARNING)  # workers say that they are idle, and libp2p says a lot
    with host.entered() if host is not None else nullcontext():
        trio.run(_answer, pipe, kind, arguments)


async def _answer(pipe: Connection, kind: type, arguments: tuple[Any, ...]) -> None:
    """Take (number, method, arguments), and send (number, result, fault), until the pipe closes."""
    async with trio.open_nursery() as nursery:
        served = kind(nursery, *arguments)

        async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
            try:
                pipe.send((number, await getattr(served, method)(*arguments), ""))
            except (AzuError, KeyError) as error:  # KeyError: the node that was meant has just left
                pipe.send((number, None, f"{type(error).__name__}: {error}"))

        while True:
            await trio.lowlevel.wait_readable(pipe.fileno())
            try:
                nursery.start_soon(answer, *pipe.recv())
            except EOFError:
                break
        nursery.cancel_scope.cancel()
