"""The demo's sub-processes: azu's own programs, watched through their JSON logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import trio

from azu.config import ENV_PREFIX
from azu.errors import InputError, InternalError

__all__ = ["Process", "start"]

_MAX_LINE_BYTES = 1_048_576
# A program that has not ended this long after SIGTERM hangs.
_GOODBYE_S = 20.0

Event = dict[str, Any]


class Process:
    """A running program; every record that it logs comes to `on_event` and lies in `log_path`."""

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self.pid = 0
        self._changed = trio.Condition()
        self._events: list[Event] = []
        self._errors: list[str] = []

    @property
    def resident_bytes(self) -> int:
        """The process's resident memory now."""
        return int(psutil.Process(self.pid).memory_info().rss)

    async def event(self, name: str) -> Event:
        """The fields of the first log record of that name, waiting for it to come."""
        async with self._changed:
            while True:
                found = next((event for event in self._events if event.get("event") == name), None)
                if found is not None:
                    fields: Event = found.get("fields", {})
                    return fields
                await self._changed.wait()

    async def take(self, line: bytes) -> Event:
        """Note one line of the program's stderr."""
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise TypeError
        except (ValueError, TypeError):
            event = {"event": line.decode(errors="replace").strip(), "level": "error"}
        if event.get("level") == "error":
            fields = event.get("fields") or {}
            self._errors.append(str(fields.get("error") or fields.get("reason") or event.get("event")))
        async with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        return event

    def ended(self, code: int) -> InternalError:
        """The error for a process that ended by itself."""
        reason = f": {self._errors[-1]}" if self._errors else ""
        return InternalError(
            f"{self.name} ended with exit code {code}{reason}",
            code="process_ended",
            remedy="Run azu-demo with --log-level debug to see its whole log" if not reason else "",
        )


async def start(
    nursery: trio.Nursery,
    name: str,
    command: Sequence[str],
    log_path: Path,
    on_event: Callable[[Process, Event], None],
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Process:
    """Start a program of azu's in the nursery; leaving the nursery ends it (SIGTERM, then SIGKILL if need be).

    Args:
        variables: of its environment; of this process's own AZU_* ones it gets none.

    Raises:
        InputError: the program is not installed beside this one.
    """
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        raise InputError(f"{program} is missing", code="missing_program", remedy="Run: pip install 'azu[demo]'")
    process = Process(name, log_path)
    ready = await nursery.start(_run, process, [str(program), *command[1:]], on_event, variables)
    process.pid = ready.pid
    return process


async def _run(
    process: Process,
    command: list[str],
    on_event: Callable[[Process, Event], None],
    variables: Mapping[str, str],
    *,
    task_status: trio.TaskStatus[trio.Process],
) -> None:
    async with trio.open_nursery() as nursery:
        env = {**_environment(), **variables}
        run = partial(trio.run_process, command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                      stderr=subprocess.PIPE, check=False, env=env, deliver_cancel=_end)  # fmt: skip
        running: trio.Process = await nursery.start(run)
        task_status.started(running)
        if running.stderr is not None:
            await _follow(process, running.stderr, on_event)
        code = await running.wait()
        raise process.ended(code)


async def _end(process: trio.Process) -> None:
    """Ask the program to end and give it time to say goodbye; trio's own patience is too short for a busy machine."""
    process.terminate()
    await trio.sleep(_GOODBYE_S)
    process.kill()


def _environment() -> dict[str, str]:
    """This process's environment without AZU_* variables: they are meant for one program, here there are several."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


async def _follow(process: Process, stream: trio.abc.ReceiveStream, on_event: Callable[[Process, Event], None]) -> None:
    """Read log lines until the process closes its stderr."""
    rest = b""
    async with await trio.open_file(process.log_path, "ab") as file:
        async for data in stream:
            await file.write(data)
            await file.flush()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                on_event(process, await process.take(line))
            if len(rest) > _MAX_LINE_BYTES:
                rest = b""
