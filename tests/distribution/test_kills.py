"""A process that fetches is killed at any moment: what it had is right, is kept, and is not fetched again.

Run as a program it is that process: `python -m tests.distribution.test_kills FOLDER PEER ADDRESS...`.
"""

from __future__ import annotations

import hashlib
import random
import sys
from functools import partial
from pathlib import Path

import trio

from azu.channel import Channel
from azu.models.manifest import PIECE_BYTES
from azu.wire.messages import BlobRange, GetBlob, encode_message
from tests.distribution.nodes import (
    BIG,
    FIRST,
    LIMIT,
    ME,
    SMALL,
    Node,
    assert_has,
    blob_of,
    fetch,
    opened,
    piece_list_of,
    served_by,
)

OTHER = BIG[::-1]
FILES = (BIG, OTHER, SMALL)
STORED = {blob_of(data).digest: data for data in (*FILES, piece_list_of(BIG), piece_list_of(OTHER))}

Place = tuple[str, int]  # a file's digest and the index of a piece


class Holder:
    """Sends what it is asked for, and stops for ever in the middle of the `stop_at`-th answer."""

    def __init__(self, node: Node) -> None:
        self.asked: list[Place] = []
        self.stopped = trio.Event()
        self.stop_at = -1
        self._node = node

    async def answer(self, channel: Channel, request: GetBlob) -> None:
        self.asked.append((request.digest, request.offset // PIECE_BYTES))
        data = self._node.library.store.read(request.digest, request.offset, request.length)
        frame = b"".join(encode_message(BlobRange(), data))
        if len(self.asked) == self.stop_at:
            await channel.stream.send_all(frame[: len(frame) // 2])
            self.stopped.set()
            await trio.sleep_forever()
        await channel.stream.send_all(frame)


def here(folder: Path) -> set[Place]:
    """The pieces on disk, under their final names or unfinished, each held against the truth."""
    found: set[Place] = set()
    for path in (folder / "layers").rglob("?" * 64):
        truth, data = STORED[path.name], path.read_bytes()
        if path.parent.name != "partial":
            assert hashlib.sha256(data).hexdigest() == path.name, "a file has a name that its bytes do not have"
        pieces = [truth[start : start + PIECE_BYTES] for start in range(0, len(truth), PIECE_BYTES)]
        found |= {
            (path.name, index)
            for index, piece in enumerate(pieces)
            if data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES] == piece
        }
    return found


async def test_killed_at_random_moments_a_fetch_goes_on_from_there(tmp_path: Path) -> None:
    chance = random.Random(7)
    mine = tmp_path / ME.peer_id
    async with opened(FIRST, tmp_path, *FILES) as node:
        holder = Holder(node)
        served_by(node, holder.answer, piece_list=b"")
        with trio.fail_after(LIMIT):
            had: set[Place] = set()
            for stop_at in (chance.randint(2, 5), chance.randint(2, 4)):
                await _fetch_and_be_killed(holder, tmp_path, stop_at, chance.random() / 50)
                assert had.isdisjoint(holder.asked), "fetched again, though it was there"
                assert had <= here(mine), "lost"
                had = here(mine)
                holder.asked.clear()
            assert had
            holder.stop_at = -1
            async with opened(ME, tmp_path) as me:
                await me.overlay.connect(node.peer_id, node.overlay.addrs)
                await fetch(me, [node], *FILES)
                assert_has(me, *STORED.values())
    every_place = {(digest, at) for digest, data in STORED.items() for at in range(-(-len(data) // PIECE_BYTES))}
    assert sorted(holder.asked) == sorted(every_place - had), "exactly what was missing"


async def _fetch_and_be_killed(holder: Holder, folder: Path, stop_at: int, later: float) -> None:
    holder.stop_at, holder.stopped = stop_at, trio.Event()
    node = holder._node
    command = [sys.executable, "-m", __name__, str(folder), node.peer_id, *node.overlay.addrs]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, check=False))
        await holder.stopped.wait()
        await trio.sleep(later)  # pieces that came before are being hashed and written
        process.kill()
    while node.overlay.connected_peers():
        await trio.sleep(0.01)


async def _fetch_in_this_process(folder: Path, peer_id: str, *addrs: str) -> None:
    async with opened(ME, folder) as me:
        await me.overlay.connect(peer_id, addrs)
        await fetch(me, [], *FILES, peers=[peer_id])


if __name__ == "__main__":
    trio.run(partial(_fetch_in_this_process, Path(sys.argv[1]), *sys.argv[2:]))
