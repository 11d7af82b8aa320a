"""Joining: a bootstrap node that is down is waited for, and the log says so."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from azu import joining
from azu.errors import InputError, NetworkError
from azu.identity import Identity
from azu.joining import stay_joined
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.peerbook import PeerBook

LIMIT = 60.0  # seconds; only keeps a hung test from hanging the run
BOOTSTRAP = Identity(b"b" * 32)


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "azu.joining")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(joining, "_LAST_RETRY_S", 0.2)
    monkeypatch.setattr(joining, "_CHECK_S", 0.1)


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    yield number  # noqa: PT022 - closed before, so that it can be listened on


def config(identity: Identity, port: int = 0) -> OverlayConfig:
    return OverlayConfig(identity.seed, (f"/ip4/127.0.0.1/tcp/{port}",))


async def until_logged(caplog: pytest.LogCaptureFixture, event: str, count: int = 1) -> list[logging.LogRecord]:
    with trio.fail_after(LIMIT):
        while len(found := [record for record in caplog.records if record.message == event]) < count:
            await trio.sleep(0.01)
    return found


@pytest.mark.usefixtures("quick")
async def test_a_bootstrap_node_that_comes_up_later_is_joined(port: int, caplog: pytest.LogCaptureFixture) -> None:
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{BOOTSTRAP.peer_id}"
    async with open_overlay(config(Identity(b"w" * 32))) as worker, trio.open_nursery() as nursery:
        started = trio.Event()

        async def join() -> None:
            await nursery.start(stay_joined, worker, [address])
            started.set()

        nursery.start_soon(join)
        first, second = (await until_logged(caplog, "cannot join yet", 2))[:2]
        for record in (first, second):
            assert record.levelno == logging.WARNING
            assert str(port) in record.fields["reason"]  # type: ignore[attr-defined]
            assert record.fields["retry_in_s"] > 0  # type: ignore[attr-defined]
        assert not started.is_set()

        async with open_overlay(config(BOOTSTRAP, port)):
            with trio.fail_after(LIMIT):
                await started.wait()
            assert worker.is_connected(BOOTSTRAP.peer_id)
            (joined,) = await until_logged(caplog, "joined the swarm")
            assert joined.fields["through"] == [BOOTSTRAP.peer_id]  # type: ignore[attr-defined]

        # It goes away and comes back: joined anew, without anybody asking.
        before = len([record for record in caplog.records if record.message == "cannot join yet"])
        await until_logged(caplog, "cannot join yet", before + 1)
        async with open_overlay(config(BOOTSTRAP, port)):
            await until_logged(caplog, "joined the swarm", 2)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("quick")
async def test_being_dialled_is_not_being_joined(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """A peer that connects to us first must not keep us from filling the routing table."""
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{BOOTSTRAP.peer_id}"
    async with (
        open_overlay(config(Identity(b"w" * 32))) as worker,
        open_overlay(config(Identity(b"p" * 32))) as peer,
        open_overlay(config(BOOTSTRAP, port)),
        trio.open_nursery() as nursery,
    ):
        await peer.connect(worker.peer_id, worker.addrs)
        with trio.fail_after(LIMIT):
            while not worker.connected_peers():
                await trio.sleep(0.01)
            await nursery.start(stay_joined, worker, [address])
        assert worker.is_connected(BOOTSTRAP.peer_id)
        nursery.cancel_scope.cancel()


async def test_a_malformed_address_is_the_operators_fault() -> None:
    async with open_overlay(config(Identity(b"w" * 32))) as worker:
        with pytest.raises(InputError):
            await stay_joined(worker, ["/ip4/127.0.0.1/tcp/1"])


class OverlayTwin:
    """An overlay whose bootstrap nodes answer, or do not, at once; it notes when it was asked."""

    def __init__(self, *, answers: bool, reached: list[str]) -> None:
        self.answers = answers
        self.reached = reached
        self.asked: list[float] = []

    def connected_peers(self) -> tuple[str, ...]:
        return tuple(self.reached) if self.answers else ()

    async def bootstrap(self, multiaddrs: list[str]) -> list[str]:
        self.asked.append(trio.current_time())
        if not self.answers:
            raise NetworkError("no bootstrap node answered")
        return self.reached


async def run_for(seconds: float, twin: OverlayTwin) -> None:
    with trio.move_on_after(seconds):
        overlay: Overlay = twin  # type: ignore[assignment]
        await stay_joined(overlay, ["/address"])


async def test_pauses_grow_and_stay_bounded(autojump_clock: trio.testing.MockClock) -> None:
    twin = OverlayTwin(answers=False, reached=[])
    await run_for(1_000, twin)
    pauses = [later - earlier for earlier, later in zip(twin.asked, twin.asked[1:], strict=False)]
    for pause, expected in zip(pauses, [1, 2, 4, 8, 16, 32, *[60] * 100], strict=False):
        assert 0.75 * expected <= pause <= 1.25 * expected
    assert len(pauses) > 10


async def test_a_bootstrap_node_that_is_this_one_does_not_spin(autojump_clock: trio.testing.MockClock) -> None:
    """The overlay leaves its own address out and reports no failure: there is nobody to join."""
    twin = OverlayTwin(answers=True, reached=[])
    await run_for(100, twin)
    assert 1 <= len(twin.asked) <= 30


async def test_no_dialling_while_joined(autojump_clock: trio.testing.MockClock) -> None:
    twin = OverlayTwin(answers=True, reached=["one", "two", "three"])
    await run_for(1_000, twin)
    assert len(twin.asked) == 1


async def test_with_few_peers_the_bootstrap_nodes_are_dialled_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    twin = OverlayTwin(answers=True, reached=["one"])
    await run_for(600, twin)
    assert 8 <= len(twin.asked) <= 11


@pytest.mark.usefixtures("quick")
async def test_remembered_peers_lead_back_without_a_bootstrap_node(
    port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = f"/ip4/127.0.0.1/tcp/{port}/p2p/{BOOTSTRAP.peer_id}"
    with trio.fail_after(LIMIT):
        async with open_overlay(config(Identity(b"o" * 32))) as other:
            async with open_overlay(config(Identity(b"w" * 32))) as worker, trio.open_nursery() as nursery:
                book = PeerBook(tmp_path / "peers.json")
                await nursery.start(partial(stay_joined, worker, [other.addrs[0]], book=book))
                while not PeerBook(tmp_path / "peers.json"):
                    await trio.sleep(0.05)
                nursery.cancel_scope.cancel()
            async with open_overlay(config(Identity(b"w" * 32))) as worker, trio.open_nursery() as nursery:
                book = PeerBook(tmp_path / "peers.json")
                await nursery.start(partial(stay_joined, worker, [gone], book=book))
                assert worker.is_connected(other.peer_id)
                nursery.cancel_scope.cancel()
    assert await until_logged(caplog, "trying remembered peers")
