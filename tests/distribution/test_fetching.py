"""Fetching files between real nodes: who lies is caught, who dies is replaced, and nothing is lost or fetched twice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio

from azu.channel import Channel
from azu.distribution import Library
from azu.errors import ModelError, NetworkError
from azu.models.manifest import PIECE_BYTES, Blob
from azu.wire.messages import LAYERS, LAYERS_PROTOCOL, BlobRange, GetBlob, HaveBlobs, Refused, WhichBlobs
from tests.distribution.nodes import (
    BIG,
    EMPTY,
    SMALL,
    SOON,
    Node,
    Nodes,
    assert_has,
    blob_of,
    fetch,
    piece_list_of,
    send_truly,
    served_by,
)


def noting(node: Node, asked: list[tuple[str, int]]) -> None:
    """Let a node serve as it does, and note file and offset of each request."""

    async def answer(channel: Channel, request: GetBlob) -> None:
        asked.append((request.digest, request.offset // PIECE_BYTES))
        await send_truly(node, channel, request)

    served_by(node, answer)


# --- all goes well


async def test_files_come_whole_and_only_the_missing_ones(nodes: Nodes) -> None:
    me, first, _ = nodes
    asked: list[tuple[str, int]] = []
    noting(first, asked)
    progress = await fetch(me, [first], BIG, SMALL, EMPTY)
    assert_has(me, BIG, SMALL, EMPTY, piece_list_of(BIG))
    assert (progress.done, progress.total, progress.percent) == (len(BIG) + len(SMALL), len(BIG) + len(SMALL), 100)
    big = blob_of(BIG).digest
    assert sorted(index for digest, index in asked if digest == big) == [0, 1, 2, 3]
    assert len(asked) == 6
    await fetch(me, [first], BIG, SMALL, EMPTY)
    assert len(asked) == 6, "what is here was asked for again"
    assert not me.overlay.statistics().violations


async def test_each_file_comes_from_whoever_has_it(nodes: Nodes) -> None:
    me, first, second = nodes
    rare = b"only the second one has this"
    second.library.store.put_bytes(rare)
    await fetch(me, [first, second], SMALL, rare)
    assert_has(me, SMALL, rare)


async def test_a_holder_that_joins_later_is_found(nodes: Nodes) -> None:
    me, first, _ = nodes
    looks = 0

    async def find_more() -> list[str]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise NetworkError("the DHT is out of reach")
        return [first.peer_id] if looks > 2 else []

    await fetch(me, [], SMALL, find_more=find_more)
    assert_has(me, SMALL)


async def test_what_a_holder_gets_later_is_used(nodes: Nodes) -> None:
    me, first, _ = nodes
    late = b"it has this a moment later"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, me, [first], SMALL, late)
        while not me.library.store.has(blob_of(SMALL).digest):
            await trio.sleep(0.01)
        first.library.store.put_bytes(late)
    assert_has(me, SMALL, late)


# --- nobody has it


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


async def test_what_nobody_has_comes_from_the_fallback(nodes: Nodes) -> None:
    me, first, _ = nodes
    lost = {data: blob_of(data) for data in (b"lost one", b"lost two")}
    brought: list[Blob] = []

    async def fallback(blob: Blob) -> int:
        brought.append(blob)
        return me.library.store.put_bytes(next(data for data, known in lost.items() if known == blob)).size

    progress = await fetch(me, [first], SMALL, *lost, fallback=fallback)
    assert first.peer_id in progress.sources
    assert_has(me, SMALL, *lost)
    assert sorted(blob.digest for blob in brought) == sorted(blob.digest for blob in lost.values())
    assert progress.percent == 100


async def test_the_fallback_counts_what_was_missing_and_leaves_nothing_unfinished(nodes: Nodes) -> None:
    me, *_ = nodes
    me.library.store.put_bytes(piece_list_of(BIG))
    (me.store_root / "partial" / blob_of(BIG).digest).write_bytes(BIG[: 2 * PIECE_BYTES])

    async def fallback(_: Blob) -> int:
        return me.library.store.put_bytes(BIG).size

    progress = await fetch(me, [], BIG, fallback=fallback)
    assert_has(me, BIG, piece_list_of(BIG))
    assert (progress.done, progress.percent) == (len(BIG), 100)
    assert progress.sources == {"the hub": len(BIG) - 2 * PIECE_BYTES}


@pytest.mark.parametrize("has_fallback", [True, False])
async def test_a_peer_that_is_always_busy_is_not_waited_for_for_ever(nodes: Nodes, has_fallback: bool) -> None:
    me, first, _ = nodes

    async def answer(channel: Channel, _: GetBlob) -> None:
        await channel.send(Refused(code="busy", message="come again"))

    async def fallback(_: Blob) -> int:
        return me.library.store.put_bytes(SMALL).size

    served_by(first, answer)
    patience = replace(SOON, stuck=1.0)
    if has_fallback:
        await fetch(me, [first], SMALL, fallback=fallback, patience=patience)
        assert_has(me, SMALL)
    else:
        with pytest.raises(NetworkError, match=f"{first.peer_id}: it refused: come again"):
            await fetch(me, [first], SMALL, patience=patience)


async def test_a_fallback_that_fails_is_named(nodes: Nodes) -> None:
    me, first, _ = nodes

    async def fallback(blob: Blob) -> int:
        raise NetworkError("the hub is down")

    with pytest.raises(NetworkError, match="the hub is down"):
        await fetch(me, [first], b"nobody has this", fallback=fallback)


# --- peers that lie


async def test_a_flipped_byte_is_caught_remembered_and_mended_by_another_peer(nodes: Nodes) -> None:
    me, first, second = nodes
    served_by(first, partial(send_truly, first, flip=77))
    await fetch(me, [first], SMALL, patience=SOON, peers=[second.peer_id])
    progress = await fetch(me, [first, second], BIG)
    assert_has(me, SMALL, BIG, piece_list_of(BIG))
    assert me.overlay.statistics().violations == {first.peer_id: 1}
    assert progress.sources == {second.peer_id: len(BIG)}, "bytes of the liar were kept"
    # It is asked nothing any more, for other files and after a restart too.
    asked: list[tuple[str, int]] = []
    noting(first, asked)
    assert first.peer_id in Library(me.store_root.parent).offenders
    with pytest.raises(NetworkError, match=rf"{first.peer_id}: it sent wrong bytes"):
        await fetch(me, [first], EMPTY)
    assert asked == []


async def test_nothing_of_a_bad_file_is_kept(nodes: Nodes) -> None:
    me, first, _ = nodes
    served_by(first, partial(send_truly, first, flip=-1))
    with pytest.raises(NetworkError, match=first.peer_id):
        await fetch(me, [first], BIG)
    assert_has(me, piece_list_of(BIG))
    assert me.library.store.digests() == {blob_of(piece_list_of(BIG)).digest}


LIES: dict[str, list[bytes]] = {
    "too many bytes": [SMALL + b"more"],
    "too few bytes": [SMALL[:4]],
    "no bytes": [b""],
    "another file": [SMALL.upper()],
}


@pytest.mark.parametrize("lie", list(LIES))
async def test_parts_that_were_not_asked_for_are_violations(nodes: Nodes, lie: str) -> None:
    me, first, second = nodes
    lied = trio.Event()

    async def answer(channel: Channel, _: GetBlob) -> None:
        for body in LIES[lie]:
            await channel.send(BlobRange(), body)
        lied.set()

    served_by(first, answer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(fetch, me, [first], SMALL, find_more=partial(_after, lied, second.peer_id)))
    assert_has(me, SMALL)
    assert me.overlay.statistics().violations == {first.peer_id: 1}


async def _after(event: trio.Event, peer_id: str) -> list[str]:
    await event.wait()
    await trio.sleep(0.1)
    return [peer_id]


@pytest.mark.parametrize("garbage", ["bytes", "an answer of another length", "another answer"])
async def test_garbage_instead_of_an_answer_is_a_violation(nodes: Nodes, garbage: str) -> None:
    me, first, second = nodes

    async def handle(stream: Any) -> None:
        channel = Channel(stream, LAYERS)
        await channel.expect(WhichBlobs)
        if garbage == "bytes":
            await stream.send_all(b"\xff" * 100)
        else:
            await channel.send(HaveBlobs() if "length" in garbage else BlobRange(), b"\1\1")
        await trio.sleep_forever()

    first.overlay.handle(LAYERS_PROTOCOL, handle)
    with pytest.raises(NetworkError):
        await fetch(me, [first], SMALL)
    await fetch(me, [second], SMALL)
    assert_has(me, SMALL)
    assert me.overlay.statistics().violations == {first.peer_id: 1}


async def test_a_peer_that_only_says_that_it_has_a_file_does_not_hold_it_up(nodes: Nodes) -> None:
    me, first, second = nodes
    asked: list[int] = []

    async def answer(channel: Channel, request: GetBlob) -> None:
        asked.append(request.offset)
        await channel.send(Refused(code="not_here", message="it is gone"))

    served_by(first, answer)
    await fetch(me, [first, second], BIG, SMALL)
    assert_has(me, BIG, SMALL, piece_list_of(BIG))
    assert len(asked) <= 4, "it was asked again for what it had refused"


async def test_a_publisher_whose_piece_list_belongs_to_other_bytes(nodes: Nodes) -> None:
    """All pieces are right by the list, and still no file gets a name that its bytes do not have."""
    me, first, _ = nodes
    other = BIG[:-1] + b"x"
    first.library.store.put_bytes(other)
    lying = Blob("0" * 64, len(BIG), blob_of(other).pieces)

    async def answer(channel: Channel, request: GetBlob) -> None:
        true = request.model_copy(update={"digest": blob_of(other).digest})
        await send_truly(first, channel, true if request.digest == lying.digest else request)

    served_by(first, answer)
    place = first.library.store.root / "blobs" / "00" / lying.digest
    place.parent.mkdir(exist_ok=True)
    place.touch()
    with pytest.raises(ModelError) as raised:
        await _fetch_blob(me, first, lying)
    assert raised.value.code == "bad_manifest"
    assert not me.library.store.has(lying.digest)
    assert not list((me.store_root / "partial").iterdir())
    assert not me.overlay.statistics().violations, "the peer is blamed for what the publisher did"


async def test_a_publisher_who_lies_about_a_file_makes_no_offender_of_who_sends_it(nodes: Nodes) -> None:
    me, first, _ = nodes
    small = blob_of(SMALL)
    with pytest.raises(NetworkError, match="another SHA-256"):
        await _fetch_blob(me, first, Blob(small.digest, small.size - 1))
    assert first.peer_id not in me.library.offenders
    await fetch(me, [first], SMALL)
    assert_has(me, SMALL)


async def _fetch_blob(me: Node, peer: Node, blob: Blob) -> None:
    from azu.distribution import fetch_blobs

    await fetch_blobs(
        me.overlay, me.library.store, [blob], peers=[peer.peer_id], offenders=me.library.offenders, patience=SOON
    )
