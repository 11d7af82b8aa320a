"""Peers that die, stall and trickle, downloads that are cut off and taken up again, and damaged disks."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from azu.channel import Channel
from azu.distribution import LayerServer
from azu.errors import InternalError, NetworkError
from azu.identity import Identity
from azu.models.manifest import PIECE_BYTES
from azu.wire.messages import LAYERS, LAYERS_PROTOCOL, BlobRange, GetBlob, encode_message
from tests.distribution.nodes import (
    BIG,
    SMALL,
    SOON,
    THIRD,
    Node,
    Nodes,
    assert_has,
    blob_of,
    fetch,
    opened,
    piece_list_of,
    send_truly,
    served_by,
)
from tests.distribution.test_fetching import noting


def frame_of(node: Node, request: GetBlob) -> bytes:
    return b"".join(
        encode_message(BlobRange(), node.library.store.read(request.digest, request.offset, request.length))
    )


class FirstPieceOnly:
    """Sends the first piece that it is asked for, half of the second, and then does nothing any more."""

    def __init__(self, node: Node) -> None:
        self.done = trio.Event()
        self._node = node
        self._sent = 0

    async def answer(self, channel: Channel, request: GetBlob) -> None:
        self._sent += 1
        if self._sent == 1:
            await send_truly(self._node, channel, request)
            return
        frame = frame_of(self._node, request)
        await channel.stream.send_all(frame[: len(frame) // 2])
        self.done.set()
        await trio.sleep_forever()


async def test_a_peer_that_is_killed_half_way_is_replaced(nodes: Nodes, tmp_path: Path) -> None:
    me, first, _ = nodes
    async with trio.open_nursery() as nursery:
        doomed = await nursery.start(_live_until_asked, tmp_path / "doomed")
        await me.overlay.connect(doomed.peer_id, doomed.overlay.addrs)
        progress = await fetch(me, [doomed], BIG, SMALL, find_more=partial(_once_gone, doomed, first))
    assert_has(me, BIG, SMALL, piece_list_of(BIG))
    assert sum(progress.sources.values()) == len(BIG) + len(SMALL), "a piece was stored twice"
    assert progress.sources[doomed.peer_id] >= PIECE_BYTES
    assert not me.overlay.statistics().violations  # going away is no crime


async def _live_until_asked(folder: Path, task_status: trio.TaskStatus[Node]) -> None:
    async with opened(THIRD, folder, BIG) as node:
        half = FirstPieceOnly(node)
        served_by(node, half.answer)
        task_status.started(node)
        await half.done.wait()


async def _once_gone(doomed: Node, other: Node) -> list[str]:
    return [other.peer_id] if not doomed.overlay.connected_peers() else []


async def test_a_peer_that_stalls_is_given_up(nodes: Nodes) -> None:
    me, first, second = nodes
    served_by(first, FirstPieceOnly(first).answer)
    with pytest.raises(NetworkError, match=r"nothing came for 0\.3 s"):
        await fetch(me, [first], BIG, patience=replace(SOON, stall=0.3))
    await fetch(me, [second], BIG)
    assert_has(me, BIG, piece_list_of(BIG))
    assert not me.overlay.statistics().violations


async def test_a_peer_that_trickles_holds_nothing_up(nodes: Nodes) -> None:
    """It sends something every second, so that it never stalls; the others do not wait for it at the end."""
    me, first, second = nodes

    async def trickle(channel: Channel, request: GetBlob) -> None:
        frame = frame_of(first, request)
        for start in range(0, len(frame), 1_000):
            await channel.stream.send_all(frame[start : start + 1_000])
            await trio.sleep(1)

    served_by(first, trickle)
    patience = replace(SOON, stall=60, piece=60)
    progress = await fetch(me, [first, second], BIG, patience=patience)
    assert_has(me, BIG, piece_list_of(BIG))
    assert first.peer_id not in progress.sources


async def test_a_peer_that_cannot_be_reached_is_passed_over(nodes: Nodes) -> None:
    me, first, _ = nodes
    await fetch(me, [], SMALL, peers=[Identity(b"n" * 32).peer_id, first.peer_id])
    assert_has(me, SMALL)


async def test_busy_peers_are_asked_again(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.distribution.serving._SLOT_IDLE_S", 0.5)
    me, first, second = nodes
    first.overlay.handle(LAYERS_PROTOCOL, LayerServer(first.library, slots=1).handle)
    async with await second.overlay.open_stream(first.peer_id, LAYERS_PROTOCOL, addrs=first.overlay.addrs) as stream:
        channel = Channel(stream, LAYERS)
        await channel.send(GetBlob(digest=blob_of(SMALL).digest, offset=0, length=1))
        await channel.expect(BlobRange)  # it has the only slot for a while
        await fetch(me, [first], SMALL, BIG)
    assert_has(me, SMALL, BIG, piece_list_of(BIG))


# --- interruptions


async def cut_off(me: Node, first: Node) -> None:
    """Fetch one piece of BIG and be cancelled."""
    half = FirstPieceOnly(first)
    served_by(first, half.answer)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, me, [first], BIG)
            await half.done.wait()
            partial_file = me.store_root / "partial" / blob_of(BIG).digest
            while not partial_file.is_file() or partial_file.read_bytes()[:PIECE_BYTES] != BIG[:PIECE_BYTES]:
                await trio.sleep(0.01)
            scope.cancel()
    assert scope.cancelled_caught


async def test_a_cancelled_fetch_is_resumed(nodes: Nodes) -> None:
    me, first, second = nodes
    await cut_off(me, first)
    asked: list[tuple[str, int]] = []
    noting(second, asked)
    progress = await fetch(me, [second], BIG)
    assert_has(me, BIG, piece_list_of(BIG))
    assert asked == [(blob_of(BIG).digest, index) for index in (1, 2, 3)]
    assert progress.percent == 100


async def test_what_a_power_loss_did_to_a_partial_is_fetched_again(nodes: Nodes) -> None:
    me, first, second = nodes
    await cut_off(me, first)
    with (me.store_root / "partial" / blob_of(BIG).digest).open("r+b") as file:
        file.seek(1_000)
        file.write(bytes(4_096))
    await fetch(me, [second], BIG)
    assert_has(me, BIG, piece_list_of(BIG))


async def test_a_partial_with_every_byte_needs_none_more(nodes: Nodes) -> None:
    me, *_ = nodes
    me.library.store.put_bytes(piece_list_of(BIG))
    (me.store_root / "partial" / blob_of(BIG).digest).write_bytes(BIG)
    await fetch(me, [], BIG)
    assert_has(me, BIG, piece_list_of(BIG))


async def test_two_at_once_do_not_disturb_each_other(nodes: Nodes) -> None:
    me, first, second = nodes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, me, [first], BIG)
        nursery.start_soon(fetch, me, [second], BIG)
    assert_has(me, BIG, piece_list_of(BIG))


# --- disks


async def test_damaged_files_are_neither_sent_nor_kept_and_come_again(nodes: Nodes) -> None:
    """As after a power loss on a disk that lied about having synced: under its name lies something else."""
    me, first, second = nodes
    place = first.library.store.path(blob_of(BIG).digest)
    place.chmod(0o644)
    place.write_bytes(bytes(len(BIG)))
    with pytest.raises(NetworkError):
        await fetch(me, [first], BIG)
    assert not me.overlay.statistics().violations, "wrong bytes were sent"
    assert not first.library.store.has(blob_of(BIG).digest)
    await fetch(first, [second], BIG, find_more=partial(_connected, first, second))
    await fetch(me, [first], BIG)
    assert_has(me, BIG, piece_list_of(BIG))


async def _connected(node: Node, other: Node) -> list[str]:
    await node.overlay.connect(other.peer_id, other.overlay.addrs)
    return [other.peer_id]


async def test_a_full_disk_ends_the_fetch(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    me, first, _ = nodes

    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InternalError) as raised:
        await fetch(me, [first], BIG)
    assert raised.value.code == "storage"
    monkeypatch.undo()
    await fetch(me, [first], BIG)
    assert_has(me, BIG, piece_list_of(BIG))
