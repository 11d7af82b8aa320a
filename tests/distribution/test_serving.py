"""The holding side: what it refuses, how much it gives away, and to how many at once."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from azu.channel import Channel
from azu.distribution import LayerServer, Offenders
from azu.distribution.pace import Pace
from azu.errors import NetworkError
from azu.models.store import LayerStore
from azu.overlay import OverlayConfig, open_overlay
from azu.wire.messages import (
    LAYERS,
    LAYERS_PROTOCOL,
    MAX_RANGE_BYTES,
    BlobRange,
    GetBlob,
    GetManifest,
    HaveBlobs,
    ManifestReply,
    Message,
    Refused,
    WhichBlobs,
)
from tests.distribution.nodes import BIG, EMPTY, FIRST, SECOND, SMALL, THIRD, Node, blob_of, opened
from tests.overlay.test_ipv6 import why_not

SMALL_DIGEST, BIG_DIGEST = blob_of(SMALL).digest, blob_of(BIG).digest


class Asker:
    """One stream to the holder."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    async def ask(self, request: Message, body: bytes = b"") -> tuple[Message, bytes]:
        await self.channel.send(request, body)
        received = await self.channel.receive()
        assert received is not None
        return received[0], bytes(received[1])

    async def code(self, request: Message) -> str:
        """The code of a refusal, or ""."""
        answer, _ = await self.ask(request)
        return answer.code if isinstance(answer, Refused) else ""


@dataclass
class Scene:
    holder: Node
    others: list[Node]

    @asynccontextmanager
    async def asker(self, number: int = 0, kind: str = "ip") -> AsyncIterator[Asker]:
        """A stream of the `number`-th other node, to addresses of that kind."""
        overlay = self.others[number].overlay
        address = [each for each in self.holder.overlay.addrs if each.startswith(f"/{kind}")]
        async with await overlay.open_stream(self.holder.peer_id, LAYERS_PROTOCOL, addrs=address) as stream:
            yield Asker(Channel(stream, LAYERS))


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(opened(FIRST, tmp_path, BIG, SMALL, EMPTY))
        askers = [await stack.enter_async_context(opened(SECOND, tmp_path))]
        with trio.fail_after(60):
            yield Scene(holder, askers)


async def test_ranges(scene: Scene) -> None:
    async with scene.asker() as asker:
        for offset, length in ((0, len(SMALL)), (3, 4), (len(SMALL), 0)):
            request = GetBlob(digest=SMALL_DIGEST, offset=offset, length=length)
            assert await asker.ask(request) == (BlobRange(), SMALL[offset : offset + length])
        answer = await asker.ask(GetBlob(digest=BIG_DIGEST, offset=5, length=MAX_RANGE_BYTES))
        assert answer == (BlobRange(), BIG[5 : 5 + MAX_RANGE_BYTES])
        assert await asker.ask(GetBlob(digest=blob_of(EMPTY).digest, offset=0, length=0)) == (BlobRange(), b"")


async def test_what_is_not_here_is_refused_and_the_stream_goes_on(scene: Scene) -> None:
    async with scene.asker() as asker:
        for _ in range(2):
            assert await asker.code(GetBlob(digest="0" * 64, offset=0, length=1)) == "not_here"
            assert await asker.code(GetManifest(digest="0" * 64)) == "not_here"
            assert await asker.code(GetBlob(digest=SMALL_DIGEST, offset=1, length=len(SMALL))) == "no_such_range"
            assert await asker.code(GetBlob(digest=SMALL_DIGEST, offset=2**44, length=1)) == "no_such_range"
    assert not scene.holder.overlay.statistics().violations


async def test_it_says_what_is_here_and_how_often_that_was_asked_for(scene: Scene) -> None:
    digests = b"".join(bytes.fromhex(digest) for digest in ("0" * 64, SMALL_DIGEST, BIG_DIGEST))
    async with scene.asker() as asker:
        assert await asker.ask(WhichBlobs(), digests) == (HaveBlobs(), b"\0\1\1")
        for _ in range(2):
            await asker.ask(GetBlob(digest=BIG_DIGEST, offset=0, length=1))
        await asker.ask(GetBlob(digest=BIG_DIGEST, offset=1, length=1))
        assert await asker.ask(WhichBlobs(), digests) == (HaveBlobs(), b"\0\1\3")
        assert await asker.ask(WhichBlobs()) == (HaveBlobs(), b"")


@pytest.mark.parametrize("garbage", ["bytes", "a reply", "a body", "a torn question"])
async def test_garbage_ends_that_stream_alone_and_is_counted(scene: Scene, garbage: str) -> None:
    async with scene.asker() as asker:
        if garbage == "bytes":
            await asker.channel.stream.send_all(b"\xff" * 64)
        elif garbage == "a reply":
            await asker.channel.send(ManifestReply())
        else:
            message = GetManifest(digest="0" * 64) if garbage == "a body" else WhichBlobs()
            await asker.channel.send(message, b"body")
        assert await asker.channel.receive() is None
    assert scene.holder.overlay.statistics().violations == {scene.others[0].peer_id: 1}
    async with scene.asker() as asker:
        assert not await asker.code(GetBlob(digest=SMALL_DIGEST, offset=0, length=1))


# --- limits

ONE_BYTE = GetBlob(digest=SMALL_DIGEST, offset=0, length=1)


async def test_one_peer_gets_two_slots_and_all_get_no_more_than_there_are(scene: Scene, tmp_path: Path) -> None:
    scene.holder.overlay.handle(LAYERS_PROTOCOL, LayerServer(scene.holder.library, slots=3).handle)
    async with AsyncExitStack() as stack:
        for number in (20, 21):
            other = type(FIRST)(bytes([number]) * 32)
            scene.others.append(await stack.enter_async_context(opened(other, tmp_path)))
        greedy = [await stack.enter_async_context(scene.asker(0)) for _ in range(3)]
        assert [await each.code(ONE_BYTE) for each in greedy] == ["", "", "busy"]
        assert (await greedy[2].ask(WhichBlobs()))[0] == HaveBlobs(), "what costs little is always answered"
        second = await stack.enter_async_context(scene.asker(1))
        third = await stack.enter_async_context(scene.asker(2))
        assert [await each.code(ONE_BYTE) for each in (second, third)] == ["", "busy"]
        assert [await each.code(ONE_BYTE) for each in (greedy[0], second)] == ["", ""], "whoever is in stays in"
        await second.channel.stream.aclose()
        while await third.code(ONE_BYTE):
            await trio.sleep(0.01)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
async def test_one_network_does_not_keep_all_slots_from_others(scene: Scene, tmp_path: Path) -> None:
    """Identities cost nothing, networks do: here IPv4's loopback and IPv6's."""
    async with AsyncExitStack() as stack:
        config = OverlayConfig(THIRD.seed, ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"))
        scene.holder = Node(await stack.enter_async_context(open_overlay(config)), scene.holder.library)
        scene.holder.overlay.handle(LAYERS_PROTOCOL, LayerServer(scene.holder.library, slots=3).handle)
        for number in (20, 21, 22, 23):
            other = type(FIRST)(bytes([number]) * 32)
            scene.others.append(await stack.enter_async_context(opened(other, tmp_path)))
        of_one = [await stack.enter_async_context(scene.asker(number, "ip4")) for number in range(3)]
        assert [await each.code(ONE_BYTE) for each in of_one] == ["", "", ""]
        other = await stack.enter_async_context(scene.asker(3, "ip6"))
        assert not await other.code(ONE_BYTE)
        third = await stack.enter_async_context(scene.asker(4, "ip6"))
        assert await third.code(ONE_BYTE) == "busy", "it would be taken to and fro"
        assert sorted([await each.code(ONE_BYTE) for each in of_one]) == ["", "", "busy"]


async def test_an_idle_stream_loses_its_slot(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.distribution.serving._SLOT_IDLE_S", 0.1)
    scene.holder.overlay.handle(LAYERS_PROTOCOL, LayerServer(scene.holder.library, slots=1).handle)
    async with scene.asker() as idle, scene.asker() as eager:
        assert not await idle.code(ONE_BYTE)
        while await eager.code(ONE_BYTE) == "busy":
            await trio.sleep(0.01)
        assert await idle.code(ONE_BYTE) == "busy"


async def test_who_reads_nothing_loses_its_slot_once_others_wait(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.distribution.serving._SLOW_S", 0.2)
    monkeypatch.setattr("azu.distribution.serving._SLOW_RATE", 1 << 20)  # a stream's window is taken at once
    scene.holder.overlay.handle(LAYERS_PROTOCOL, LayerServer(scene.holder.library, slots=1).handle)
    async with opened(THIRD, tmp_path) as third, scene.asker() as stuck:
        scene.others.append(third)
        await stuck.channel.send(GetBlob(digest=BIG_DIGEST, offset=0, length=MAX_RANGE_BYTES))
        async with scene.asker(1) as eager:
            while await eager.code(ONE_BYTE) == "busy":
                await trio.sleep(0.01)
        with pytest.raises(NetworkError, match="in the middle of a frame"):
            await stuck.channel.receive()
    assert not scene.holder.overlay.statistics().violations


async def test_who_asks_for_little_loses_its_slot_once_others_wait(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("azu.distribution.serving._SLOW_S", 0.2)
    scene.holder.overlay.handle(LAYERS_PROTOCOL, LayerServer(scene.holder.library, slots=1).handle)
    async with opened(THIRD, tmp_path) as third, scene.asker() as trickle:
        scene.others.append(third)
        for _ in range(60):
            assert not await trickle.code(ONE_BYTE), "nobody else wants it"
            await trio.sleep(0.01)
        async with scene.asker(1) as eager, trio.open_nursery() as nursery:

            async def read_on() -> None:
                while True:
                    await eager.ask(GetBlob(digest=BIG_DIGEST, offset=0, length=1 << 20))

            nursery.start_soon(read_on)
            code = ""
            while not code:
                try:
                    await trickle.channel.send(ONE_BYTE)
                    received = await trickle.channel.receive()
                except NetworkError:
                    received = None
                code = getattr(received[0], "code", "") if received is not None else "reset"  # if it was being answered
            assert code in ("busy", "reset")
            nursery.cancel_scope.cancel()


async def test_a_slow_disk_leaves_threads_to_everybody_else(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Semaphore(0), threading.Event()

    def has(*_: object) -> bool:
        inside.release()
        return go_on.wait(60)

    monkeypatch.setattr(LayerStore, "has", has)
    async with AsyncExitStack() as stack:
        askers = [await stack.enter_async_context(scene.asker()) for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for asker in askers:
                nursery.start_soon(asker.ask, WhichBlobs(), bytes(32))
            for _ in range(2):
                await trio.to_thread.run_sync(inside.acquire)
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            await trio.sleep(0.1)
            assert not inside.acquire(blocking=False), "all of them look at once"
            go_on.set()


async def test_the_rate_holds_over_all_streams(scene: Scene) -> None:
    rate = 4 << 20
    scene.holder.overlay.handle(LAYERS_PROTOCOL, LayerServer(scene.holder.library, rate=rate).handle)
    started = trio.current_time()
    async with scene.asker() as one, scene.asker() as two, trio.open_nursery() as nursery:
        for asker in (one, two):
            nursery.start_soon(asker.ask, GetBlob(digest=BIG_DIGEST, offset=0, length=3 << 20))
    took = trio.current_time() - started
    assert took > (6 << 20) / rate - 0.5, "6 MiB at 4 MiB/s, a quarter of a second at once, and the last slice free"


def test_pace() -> None:
    pace = Pace(1000)
    assert [pace.delay(100, 50.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.05, 0.15])
    assert pace.delay(100, 51.0) == 0, "after a pause"
    pace = Pace(1000)
    started = [pace.delay(100, now) + now for now in (each / 100 for each in range(300))]
    assert started[-1] == pytest.approx(29.9), "the 299 before it"


# --- offenders


def test_offenders_are_remembered_for_a_day_and_over_restarts(tmp_path: Path) -> None:
    now = 1_000_000.0
    path = tmp_path / "offenders.json"
    offenders = Offenders(path, clock=lambda: now)
    offenders.add("a liar")
    assert "a liar" in offenders
    assert "a liar" in Offenders(path, clock=lambda: now + 86_000)
    assert "a liar" not in Offenders(path, clock=lambda: now + 86_401)
    assert "a liar" not in Offenders(path, clock=lambda: now - 10), "a clock that was set back forgives"
    assert "somebody else" not in offenders


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": "x"}', b"\xff"])
def test_a_damaged_list_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "offenders.json"
    path.write_bytes(content)
    offenders = Offenders(path)
    assert "a" not in offenders
    offenders.add("b")
    assert "b" in Offenders(path)


def test_the_list_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.distribution.offenders._MAX_OFFENDERS", 3)
    offenders = Offenders(tmp_path / "offenders.json")
    for peer in "abcd":
        offenders.add(peer)
    assert [peer in offenders for peer in "abcd"] == [False, True, True, True]
