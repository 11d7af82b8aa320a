"""A js-libp2p node as a process of its own, steered by JSON lines (js/peer.mjs)."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

__all__ = ["JsError", "JsPeer", "open_js_peer"]

PATIENCE_S = 60.0  # for one answer; only a hang takes this long


class JsError(Exception):
    """What js-libp2p threw."""


class JsPeer:
    """The node. `peer_id` and `addrs` (multiaddrs with /p2p/) are its own."""

    def __init__(self, process: trio.Process) -> None:
        self.peer_id = ""
        self.addrs: tuple[str, ...] = ()
        self._process = process
        self._waiting: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._calls = 0
        self._turn = trio.Lock()

    async def call(self, op: str, **arguments: Any) -> Any:
        """Run an operation of peer.mjs and return its result.

        Raises:
            JsError: it threw.
        """
        assert self._process.stdin is not None
        self._calls += 1
        number = self._calls
        sender, receiver = trio.open_memory_channel[dict[str, Any]](1)
        self._waiting[number] = sender
        with trio.fail_after(PATIENCE_S):
            async with self._turn:
                await self._process.stdin.send_all(json.dumps({"id": number, "op": op, **arguments}).encode() + b"\n")
            answer = await receiver.receive()
        if "error" in answer:
            raise JsError(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        """End it as a power cut would: nothing more is sent."""
        self._process.kill()

    def stop(self) -> None:
        """Keep it from running, without an end of its connections."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._process.send_signal(signal.SIGCONT)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        pending = b""
        async for data in self._process.stdout:
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self._waiting.pop(answer["id"]).send_nowait(answer)
        for waiting in self._waiting.values():
            waiting.close()


@asynccontextmanager
async def open_js_peer(home: Path, **settings: Any) -> AsyncIterator[JsPeer]:
    """Start a node out of the folder that `install` filled; it is killed when the context is left.

    Settings are peer.mjs's: server (bool).
    """
    command = ["node", str(home / "peer.mjs"), json.dumps(settings)]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    peer = JsPeer(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer._read)
            itself = await peer.call("self")
            peer.peer_id, peer.addrs = itself["peer"], tuple(itself["addrs"])
            yield peer
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
