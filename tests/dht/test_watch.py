"""The real `azu-dht watch` on a pseudo-terminal, at a pipe, and as JSON."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

import pytest
import trio

from azu.overlay import open_overlay
from tests.dht.conftest import Program
from tests.dht.lively import COORDINATOR, GONE, HOSTILE, ME, Lively
from tests.dht.records import MODEL, coordinator, held, identity, offer, worker
from tests.dht.swarm import (
    EVIL,
    LIMIT,
    PROGRAM,
    ROOT,
    Swarm,
    a_swarm,
    config,
    publish,
    surroundings,
)

ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


class Terminal:
    """A pseudo-terminal with the program on it."""

    def __init__(self, *words: str, columns: int = 160, lines: int = 40, **variables: str) -> None:
        self.shown = ""
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [PROGRAM, "watch", *words], stdin=self._slave, stdout=self._slave, stderr=self._slave, cwd=ROOT,
            env=surroundings() | {"TERM": "xterm-256color"} | variables, preexec_fn=self._take_over,
        )  # fmt: skip
        os.set_blocking(self._master, False)

    def _take_over(self) -> None:
        os.setsid()
        fcntl.ioctl(self._slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal

    @property
    def attributes(self) -> list[object]:
        return termios.tcgetattr(self._slave)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    async def wait(self, condition: Callable[[], object]) -> None:
        """Take what it writes until the condition holds, or until it has ended and written all."""
        with trio.move_on_after(LIMIT):
            while not condition():
                is_over = self.process.poll() is not None
                try:
                    self.shown += os.read(self._master, 1 << 16).decode(errors="replace")
                except BlockingIOError:
                    if is_over:
                        break
                    await trio.sleep(0.02)
        assert condition(), self.shown[-2_000:]

    async def wait_for(self, text: str, after: int = 0) -> None:
        await self.wait(lambda: text in self.shown[after:])

    async def ended(self) -> int:
        await self.wait(lambda: self.process.poll() is not None)
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextmanager
def on_a_terminal(*words: str, **settings: object) -> Iterator[Terminal]:
    terminal = Terminal(*words, **settings)  # type: ignore[arg-type]
    try:
        yield terminal
    finally:
        terminal.close()


def visitors(swarm: Swarm) -> set[str]:
    """Peers at the bootstrap node that are none of the swarm's own."""
    return set(swarm.meeting_point.connected_peers()) - {peer.peer_id for peer in swarm.peers}


@pytest.mark.swarm
async def test_it_refreshes_scrolls_and_leaves_the_terminal_as_it_was() -> None:
    now = int(time.time())
    records = (worker(1, held(0, 12), now=now, addrs=()), coordinator(2, offer(), now=now, agent=EVIL))
    async with a_swarm(*records) as swarm:
        with on_a_terminal("--interval", "1", "--bootstrap", swarm.address) as terminal:
            await terminal.wait_for("1 coordinator, 1 worker")
            assert terminal.shown.index(ENTER) < terminal.shown.index("azu-dht watch")
            assert identity(1).peer_id[-8:] in terminal.shown
            assert MODEL in terminal.shown
            assert "\x1b]0;owned" not in terminal.shown
            assert "\x07" not in terminal.shown
            mine = visitors(swarm)
            assert len(mine) == 1
            assert not terminal.attributes[3] & (termios.ICANON | termios.ECHO)

            async with open_overlay(config(3)) as late:  # it joins while we watch
                await late.bootstrap(swarm.meeting_point.addrs)
                await publish(late, 3, worker(3, held(12, 30), now=now).model_copy(update={"addrs": late.addrs}))
                await terminal.wait_for("1 coordinator, 2 workers")
                await terminal.wait_for("30, all loaded")
                assert visitors(swarm) - {late.peer_id} == mine, "one overlay for all refreshes"

            terminal.type(b"\x1a")  # Ctrl-Z would leave the shell on our screen
            terminal.type(b"q")
            assert await terminal.ended() == 0
            await terminal.wait_for(LEAVE)
            await terminal.wait_for(SHOW_CURSOR)
            assert terminal.attributes == terminal.before


@pytest.mark.swarm
async def test_it_scrolls_and_ctrl_c_ends_it(lively: Lively) -> None:
    with on_a_terminal("--bootstrap", lively.address, columns=60, lines=10) as terminal:
        await terminal.wait_for("lines 1-7 of")
        terminal.type(b"jj\x1b[B")
        await terminal.wait_for("lines 4-10 of")
        terminal.type(b"\x1b[Ak")
        await terminal.wait_for("lines 2-8 of")
        terminal.type(b"\x03")
        assert await terminal.ended() == 130
        await terminal.wait_for(SHOW_CURSOR)
        assert terminal.attributes == terminal.before


@pytest.mark.swarm
async def test_the_swarm_goes_away_and_comes_back() -> None:
    async with AsyncExitStack() as stack:
        async with open_overlay(config(1000)) as node:
            terminal = stack.enter_context(on_a_terminal("--interval", "1", "--bootstrap", node.addrs[0]))
            await terminal.wait_for("no workers and no coordinators")
            listen = node.addrs[0].partition("/p2p/")[0]
        await terminal.wait_for("refresh failed: no bootstrap node answered: nothing listens at")
        since = len(terminal.shown)
        async with open_overlay(config(1000, listen=(listen,))):
            await terminal.wait_for("0 coordinators, 0 workers", since)
            terminal.type(b"q")
            assert await terminal.ended() == 0


def test_a_pipe_is_refused(program: Program) -> None:
    said = program.refusal(2, "watch")
    assert ("not a terminal" in said, "--json" in said) == (True, True)


async def test_a_dumb_terminal_is_refused() -> None:
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{identity(1).peer_id}"
    with on_a_terminal("--bootstrap", address, TERM="dumb") as terminal:
        assert await terminal.ended() == 2
        await terminal.wait_for("--json")
        assert ENTER not in terminal.shown


@pytest.mark.swarm
async def test_nobody_answers_at_the_start() -> None:
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{identity(1).peer_id}"
    with on_a_terminal("--bootstrap", address) as terminal:
        assert await terminal.ended() == 1
        await terminal.wait_for("nothing listens at")
        assert ENTER not in terminal.shown, "an error belongs on the screen that stays"


@pytest.mark.swarm
async def test_json_is_a_document_a_line_until_nobody_reads_it(lively: Lively) -> None:
    words = ("watch", "--json", "--interval", "1", "--bootstrap", lively.address)
    with trio.fail_after(LIMIT):
        process = await trio.lowlevel.open_process(
            [PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=surroundings()
        )
        text = b""
        assert process.stdout is not None
        while text.count(b"\n") < 2:
            text += await process.stdout.receive_some()
        await process.stdout.aclose()
        await process.wait()
        assert process.stderr is not None
        assert await process.stderr.receive_some() == b""
    first, second = (json.loads(line) for line in text.splitlines()[:2])
    assert first["taken_at"] < second["taken_at"]
    for document in (first, second):
        assert document["error"] is None
        assert {each["peer_id"] for each in document["peers"]} == {ME, COORDINATOR, HOSTILE, GONE}
        assert document["models"][0]["missing"] == [{"start": 12, "end": 30}]
