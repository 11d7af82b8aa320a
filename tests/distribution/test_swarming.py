"""Many workers and one publisher: everybody gets every layer, and the publisher need not send it to each."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from azu.channel import Channel
from azu.identity import Identity
from azu.wire.messages import GetBlob
from tests.distribution.nodes import (
    BIG,
    LIMIT,
    PUBLISHER,
    SOON,
    Node,
    assert_has,
    blob_of,
    fetch,
    opened,
    piece_list_of,
    send_truly,
    served_by,
)

WEIGHTS = [hashlib.shake_256(b"layer %d" % number).digest(512 << 10) for number in range(12)]
MODEL = bytes.fromhex(hashlib.sha256(b"the manifest").hexdigest())


async def test_four_workers_get_every_layer_though_the_publisher_leaves_after_the_first_copy(tmp_path: Path) -> None:
    workers = [Identity(bytes([number]) * 32) for number in range(10, 14)]
    progress: dict[str, dict[str, int]] = {}
    gone = trio.Event()
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(opened(each, tmp_path)) for each in workers]
        with trio.fail_after(LIMIT):
            publisher = await nursery.start(partial(_publish, tmp_path, nodes, gone))
            for node in nodes[1:]:
                await node.overlay.bootstrap(nodes[0].overlay.addrs)
            for node in nodes:
                await node.overlay.connect(publisher.peer_id, publisher.overlay.addrs)
                await node.overlay.provide(MODEL)
            async with trio.open_nursery() as fetching:
                for node in nodes:
                    fetching.start_soon(_fetch, node, publisher.peer_id, progress)
        for node in nodes:
            assert_has(node, *WEIGHTS)
    assert gone.is_set(), "the publisher stayed to the end"
    one_copy = sum(map(len, WEIGHTS))
    by_publisher = sum(each.get(publisher.peer_id, 0) for each in progress.values())
    assert one_copy <= by_publisher < 2.5 * one_copy, "the workers did not swap"
    assert sum(sum(each.values()) for each in progress.values()) == 4 * one_copy


async def _publish(folder: Path, workers: Sequence[Node], gone: trio.Event, task_status: trio.TaskStatus[Node]) -> None:
    """Be there with a limited rate until each layer is at some worker."""
    async with opened(PUBLISHER, folder, *WEIGHTS, rate=3 << 20) as publisher:
        task_status.started(publisher)
        while not all(any(_has(worker, layer) for worker in workers) for layer in WEIGHTS):
            await trio.sleep(0.02)
        gone.set()


def _has(node: Node, data: bytes) -> bool:
    return node.library.store.has(blob_of(data).digest)


async def _fetch(node: Node, publisher: str, progress: dict[str, dict[str, int]]) -> None:
    find_more = partial(node.overlay.providers, MODEL)
    patience = replace(SOON, give_up=LIMIT)  # a worker may have to wait for another to get it
    fetched = await fetch(node, [], *WEIGHTS, peers=[publisher], find_more=find_more, patience=patience)
    progress[node.peer_id] = fetched.sources


HUGE = BIG + BIG  # seven pieces, of which three peers are asked for six at once


async def test_one_file_comes_from_three_peers_at_once(tmp_path: Path) -> None:
    async with _me_and_three_holders(tmp_path) as (me, holders):
        progress = await fetch(me, holders, HUGE)
    assert {holder.peer_id for holder in holders} == set(progress.sources)
    assert sum(progress.sources.values()) == len(HUGE)


async def test_of_many_peers_the_one_that_lies_is_named_and_dropped(tmp_path: Path) -> None:
    async with _me_and_three_holders(tmp_path, liars={1}) as (me, holders):
        progress = await fetch(me, holders, HUGE)
        assert me.overlay.statistics().violations == {holders[1].peer_id: 1}
        assert [holder.peer_id in me.library.offenders for holder in holders] == [False, True, False]
    assert holders[1].peer_id not in progress.sources
    assert sum(progress.sources.values()) == len(HUGE)


@asynccontextmanager
async def _me_and_three_holders(folder: Path, liars: Container[int] = ()) -> AsyncIterator[tuple[Node, list[Node]]]:
    """Holders that answer nothing before all of them were asked for something."""
    asked: set[str] = set()
    all_asked = trio.Event()

    async def answer(node: Node, flip: int | None, channel: Channel, request: GetBlob) -> None:
        asked.add(node.peer_id)
        if len(asked) == 3:
            all_asked.set()
        await all_asked.wait()
        await send_truly(node, channel, request, flip=flip)

    async with AsyncExitStack() as stack:
        me = await stack.enter_async_context(opened(PUBLISHER, folder))
        identities = [Identity(bytes([number]) * 32) for number in range(10, 13)]
        holders = [await stack.enter_async_context(opened(each, folder, HUGE)) for each in identities]
        for number, holder in enumerate(holders):
            served_by(holder, partial(answer, holder, 123 if number in liars else None), piece_list_of(HUGE))
            await me.overlay.connect(holder.peer_id, holder.overlay.addrs)
        with trio.fail_after(LIMIT):
            yield me, holders
