"""Fetching files between real nodes: who lies is caught, who dies is replaced, and nothing is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from azu import distribution
from azu.channel import Channel
from azu.distribution import fetch_blobs
from azu.errors import NetworkError
from azu.identity import Identity
from azu.overlay import OverlayStream
from azu.wire.messages import (
    LAYERS,
    LAYERS_PROTOCOL,
    MAX_PART_BYTES,
    BlobPart,
    GetBlob,
)
from tests.layer_nodes import (
    BIG,
    EMPTY,
    SMALL,
    Node,
    Nodes,
    assert_has,
    blob_of,
    fetch,
    opened,
    three_nodes,
)

Handler = Callable[[OverlayStream], Awaitable[None]]


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with three_nodes(tmp_path) as opened_nodes:
        yield opened_nodes


def answering(reply: Callable[[Channel, GetBlob], Awaitable[None]]) -> Handler:
    """A handler that answers one request for a file as `reply` does, and leaves."""

    async def handle(stream: OverlayStream) -> None:
        channel = Channel(stream, LAYERS)
        request, _ = await channel.expect(GetBlob)
        await reply(channel, request)

    return handle


def noting(node: Node, offsets: list[int]) -> Handler:
    """The real handler, which also notes at which offsets files are asked for."""

    async def handle(stream: OverlayStream) -> None:
        channel = Channel(stream, LAYERS, max_body=0)
        while (received := await channel.receive()) is not None:
            request, _ = received
            assert isinstance(request, GetBlob)
            offsets.append(request.offset)
            await distribution._answer(node.library, channel, request)

    return handle


# --- files


async def test_files_come_whole_and_only_the_missing_ones(nodes: Nodes) -> None:
    me, first, _ = nodes
    offsets: list[int] = []
    first.overlay.handle(LAYERS_PROTOCOL, noting(first, offsets))
    arrived: list[int] = []
    await fetch(me, [first], BIG, SMALL, EMPTY, progress=arrived.append)
    assert_has(me, BIG, SMALL, EMPTY)
    assert sum(arrived) == len(BIG) + len(SMALL)
    assert max(arrived) <= MAX_PART_BYTES
    assert offsets == [0, 0, 0]
    await fetch(me, [first], BIG, SMALL, EMPTY)
    assert offsets == [0, 0, 0], "what is here was asked for again"


async def test_each_file_comes_from_whoever_has_it(nodes: Nodes, tmp_path: Path) -> None:
    me, first, second = nodes
    rare = b"only the second one has this"
    second.library.store.put_bytes(rare)
    await fetch(me, [first, second], SMALL, rare)
    assert_has(me, SMALL, rare)
    assert not me.overlay.statistics().violations


async def test_a_file_that_nobody_has(nodes: Nodes) -> None:
    me, first, second = nodes
    with pytest.raises(NetworkError) as raised:
        await fetch(me, [first, second], SMALL, b"nobody has this")
    assert raised.value.code == "no_provider"
    assert raised.value.remedy
    assert_has(me, SMALL)  # what could be had was kept
    assert not me.overlay.statistics().violations


async def test_without_peers_there_is_nothing_to_fetch_from(nodes: Nodes) -> None:
    me, *_ = nodes
    with pytest.raises(NetworkError, match="none has it"):
        await fetch(me, [], SMALL)
    await fetch(me, [])


async def send_flipped(node: Node, channel: Channel, request: GetBlob) -> None:
    data = bytearray(node.library.store.read(request.digest, 0, 1 << 30))
    data[len(data) // 2] ^= 1
    for offset in range(0, len(data), MAX_PART_BYTES):
        await channel.send(BlobPart(offset=offset, size=len(data)), data[offset : offset + MAX_PART_BYTES])


async def test_a_flipped_byte_is_caught_counted_and_mended_by_another_peer(nodes: Nodes) -> None:
    me, first, second = nodes
    first.overlay.handle(LAYERS_PROTOCOL, answering(partial(send_flipped, first)))
    await fetch(me, [first, second], BIG, SMALL)
    assert_has(me, BIG, SMALL)
    assert me.overlay.statistics().violations == {first.peer_id: 1}


async def test_nothing_of_a_bad_file_is_kept(nodes: Nodes) -> None:
    me, first, _ = nodes
    first.overlay.handle(LAYERS_PROTOCOL, answering(partial(send_flipped, first)))
    with pytest.raises(NetworkError):
        await fetch(me, [first], BIG)
    assert_has(me)
    assert not me.library.store.digests()


LIES: dict[str, list[tuple[BlobPart, bytes]]] = {
    "another size": [(BlobPart(offset=0, size=5), b"abcde")],
    "another offset": [(BlobPart(offset=1, size=len(SMALL)), SMALL[1:])],
    "too many bytes": [(BlobPart(offset=0, size=len(SMALL)), SMALL + b"more")],
    "no bytes": [(BlobPart(offset=0, size=len(SMALL)), b"")] * 2,
    "the same part again": [(BlobPart(offset=0, size=len(SMALL)), SMALL[:4])] * 2,
    "another file": [(BlobPart(offset=0, size=len(SMALL)), SMALL.upper())],
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_parts_that_were_not_asked_for_are_violations(nodes: Nodes, lie: str) -> None:
    me, first, second = nodes

    async def reply(channel: Channel, _: GetBlob) -> None:
        for message, body in LIES[lie]:
            await channel.send(message, body)

    first.overlay.handle(LAYERS_PROTOCOL, answering(reply))
    await fetch(me, [first, second], SMALL)
    assert_has(me, SMALL)
    assert me.overlay.statistics().violations == {first.peer_id: 1}


async def test_garbage_instead_of_a_part_is_a_violation(nodes: Nodes) -> None:
    me, first, second = nodes

    async def reply(channel: Channel, _: GetBlob) -> None:
        await channel.stream.send_all(b"\xff" * 100)

    first.overlay.handle(LAYERS_PROTOCOL, answering(reply))
    await fetch(me, [first, second], SMALL)
    assert_has(me, SMALL)
    assert me.overlay.statistics().violations == {first.peer_id: 1}


async def send_first_part(node: Node, channel: Channel, request: GetBlob) -> None:
    await channel.send(BlobPart(offset=0, size=len(BIG)), node.library.store.read(request.digest, 0, MAX_PART_BYTES))


async def test_a_file_that_breaks_off_is_resumed_at_another_peer(nodes: Nodes) -> None:
    me, first, second = nodes
    offsets: list[int] = []
    first.overlay.handle(LAYERS_PROTOCOL, answering(partial(send_first_part, first)))
    second.overlay.handle(LAYERS_PROTOCOL, noting(second, offsets))
    arrived: list[int] = []
    await fetch(me, [first, second], BIG, progress=arrived.append)
    assert_has(me, BIG)
    assert offsets == [MAX_PART_BYTES]
    assert sum(arrived) == len(BIG), "a byte was fetched twice"
    assert not me.overlay.statistics().violations  # going away is no crime


async def test_a_partial_of_an_earlier_run_is_resumed(nodes: Nodes) -> None:
    me, first, _ = nodes
    blob = blob_of(BIG)
    with me.library.store.writer(blob.digest, blob.size) as writer:
        writer.write(BIG[:1_000])
    offsets: list[int] = []
    first.overlay.handle(LAYERS_PROTOCOL, noting(first, offsets))
    await fetch(me, [first], BIG)
    assert_has(me, BIG)
    assert offsets == [1_000]


async def test_a_partial_with_every_byte_needs_none_more(nodes: Nodes) -> None:
    me, first, _ = nodes
    blob = blob_of(SMALL)
    with me.library.store.writer(blob.digest, blob.size) as writer:
        writer.write(SMALL)
    arrived: list[int] = []
    await fetch(me, [first], SMALL, progress=arrived.append)
    assert_has(me, SMALL)
    assert sum(arrived) == 0


@pytest.mark.parametrize("left", [b"poison", b"x" * len(SMALL)])
async def test_what_a_liar_left_behind_is_not_blamed_on_who_comes_after(nodes: Nodes, left: bytes) -> None:
    """A peer that sends bad bytes and breaks off before the end must not make an honest one look bad."""
    me, first, second = nodes

    async def reply(channel: Channel, _: GetBlob) -> None:
        await channel.send(BlobPart(offset=0, size=len(SMALL)), left[: len(SMALL) - 1])

    offsets: list[int] = []
    first.overlay.handle(LAYERS_PROTOCOL, answering(reply))
    second.overlay.handle(LAYERS_PROTOCOL, noting(second, offsets))
    await fetch(me, [first, second], SMALL)
    assert_has(me, SMALL)
    assert offsets == [min(len(left), len(SMALL) - 1), 0]
    assert not me.overlay.statistics().violations


async def test_a_peer_that_is_killed_half_way_is_replaced(nodes: Nodes, tmp_path: Path) -> None:
    me, first, _ = nodes
    async with trio.open_nursery() as nursery:
        doomed: Node = await nursery.start(_live_until_asked, tmp_path / "doomed")
        await me.overlay.connect(doomed.peer_id, doomed.overlay.addrs)
        await fetch(me, [doomed, first], BIG, SMALL)
    assert_has(me, BIG, SMALL)
    assert not me.overlay.statistics().violations


async def _live_until_asked(folder: Path, task_status: trio.TaskStatus[Node]) -> None:
    asked = trio.Event()

    async def reply(channel: Channel, request: GetBlob) -> None:
        await send_first_part(node, channel, request)
        asked.set()
        await trio.sleep_forever()

    async with opened(Identity(b"d" * 32), folder, BIG) as node:
        node.overlay.handle(LAYERS_PROTOCOL, answering(reply))
        task_status.started(node)
        await asked.wait()


async def test_a_peer_that_stalls_is_given_up(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "_STALL_S", 0.3)
    me, first, second = nodes

    async def reply(channel: Channel, request: GetBlob) -> None:
        await send_first_part(first, channel, request)
        await trio.sleep_forever()

    first.overlay.handle(LAYERS_PROTOCOL, answering(reply))
    with pytest.raises(NetworkError, match=r"nothing came for 0\.3 s"):
        await fetch(me, [first], BIG)
    await fetch(me, [second], BIG)
    assert_has(me, BIG)
    assert not me.overlay.statistics().violations


async def test_a_peer_that_cannot_be_reached_is_passed_over(nodes: Nodes) -> None:
    me, first, _ = nodes
    await fetch_blobs(me.overlay, [Identity(b"n" * 32).peer_id, first.peer_id], me.library.store, [blob_of(SMALL)])
    assert_has(me, SMALL)


async def test_two_at_once_do_not_disturb_each_other(nodes: Nodes) -> None:
    me, first, second = nodes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, me, [first], BIG)
        nursery.start_soon(fetch, me, [second], BIG)
    assert_has(me, BIG)


async def test_a_cancelled_fetch_keeps_what_came(nodes: Nodes) -> None:
    me, first, _ = nodes
    with trio.CancelScope() as scope:
        await fetch(me, [first], BIG, progress=lambda _: scope.cancel())
    assert scope.cancelled_caught
    offsets: list[int] = []
    first.overlay.handle(LAYERS_PROTOCOL, noting(first, offsets))
    await fetch(me, [first], BIG)
    assert_has(me, BIG)
    assert offsets == [MAX_PART_BYTES]
