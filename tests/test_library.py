"""The holding side of distribution: what a library serves, what it keeps, and manifests with their publishers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from azu.channel import Channel
from azu.distribution import Library, fetch_manifest, open_manifest
from azu.errors import ModelError, NetworkError, TrustError
from azu.identity import Kind, seal
from azu.wire.messages import (
    LAYERS,
    LAYERS_PROTOCOL,
    BlobPart,
    GetBlob,
    GetManifest,
    ManifestReply,
    Refused,
)
from tests.layer_nodes import (
    BIG,
    PUBLISHER,
    SMALL,
    Nodes,
    assert_has,
    blob_of,
    fetch,
    manifest_of,
    three_nodes,
)


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with three_nodes(tmp_path) as opened_nodes:
        yield opened_nodes


# --- the serving side


@pytest.mark.parametrize(
    "request_", [GetBlob(digest="0" * 64, offset=0), GetManifest(digest="0" * 64)], ids=["blob", "manifest"]
)
async def test_what_is_not_here_is_refused_and_the_stream_goes_on(
    nodes: Nodes, request_: GetBlob | GetManifest
) -> None:
    me, first, _ = nodes
    async with await me.overlay.open_stream(first.peer_id, LAYERS_PROTOCOL) as stream:
        channel = Channel(stream, LAYERS)
        for _ in range(2):
            await channel.send(request_)
            received = await channel.receive()
            assert received is not None
            assert isinstance(received[0], Refused)
            assert received[0].code == "not_here"
    assert not first.overlay.statistics().violations


async def test_an_offset_past_the_end_gives_no_byte(nodes: Nodes) -> None:
    me, first, _ = nodes
    async with await me.overlay.open_stream(first.peer_id, LAYERS_PROTOCOL) as stream:
        channel = Channel(stream, LAYERS)
        for offset in (len(SMALL), len(SMALL) + 1, 2**44):
            await channel.send(GetBlob(digest=blob_of(SMALL).digest, offset=offset))
            part, body = await channel.expect(BlobPart)
            assert (part.offset, part.size, body) == (len(SMALL), len(SMALL), b"")


@pytest.mark.parametrize("garbage", ["bytes", "a reply", "a body"])
async def test_garbage_ends_that_stream_alone_and_is_counted(nodes: Nodes, garbage: str) -> None:
    me, first, _ = nodes
    async with await me.overlay.open_stream(first.peer_id, LAYERS_PROTOCOL) as stream:
        channel = Channel(stream, LAYERS)
        if garbage == "bytes":
            await stream.send_all(b"\xff" * 64)
        elif garbage == "a reply":
            await channel.send(ManifestReply())
        else:
            await channel.send(GetManifest(digest="0" * 64), b"body")
        assert await channel.receive() is None
    assert first.overlay.statistics().violations == {me.peer_id: 1}
    await fetch(me, [first], SMALL)
    assert_has(me, SMALL)


# --- manifests

MANIFEST = manifest_of(BIG, SMALL)


async def test_a_manifest_comes_with_its_publisher(nodes: Nodes) -> None:
    me, first, second = nodes
    second.library.publish(PUBLISHER, MANIFEST)
    peers = [first.peer_id, second.peer_id]
    envelope, publisher, manifest = await fetch_manifest(me.overlay, peers, MANIFEST.digest)
    assert (publisher, manifest) == (PUBLISHER.peer_id, MANIFEST)
    me.library.keep(MANIFEST.digest, envelope)
    assert me.library.manifests() == ((MANIFEST.digest, MANIFEST),)
    assert not me.overlay.statistics().violations

    # Whoever fetched it may pass it on; the publisher's signature comes along.
    _, publisher, _ = await fetch_manifest(second.overlay, [me.peer_id], MANIFEST.digest)
    assert publisher == PUBLISHER.peer_id


async def test_a_manifest_that_nobody_has(nodes: Nodes) -> None:
    me, first, second = nodes
    with pytest.raises(NetworkError) as raised:
        await fetch_manifest(me.overlay, [first.peer_id, second.peer_id], MANIFEST.digest)
    assert raised.value.code == "no_provider"
    assert not me.overlay.statistics().violations


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


FORGERIES = {
    "another manifest": seal(PUBLISHER, Kind.MANIFEST, manifest_of(SMALL).to_bytes()),
    "another kind": seal(PUBLISHER, Kind.RECEIPT, MANIFEST.to_bytes()),
    "a changed byte": _flipped(seal(PUBLISHER, Kind.MANIFEST, MANIFEST.to_bytes())),
    "no envelope": MANIFEST.to_bytes(),
    "nothing": b"",
}


@pytest.mark.parametrize("forgery", list(FORGERIES))
async def test_a_forged_manifest_is_caught_and_counted(nodes: Nodes, forgery: str) -> None:
    me, first, second = nodes
    first.library.keep(MANIFEST.digest, FORGERIES[forgery])
    second.library.publish(PUBLISHER, MANIFEST)
    peers = [first.peer_id, second.peer_id]
    _, publisher, manifest = await fetch_manifest(me.overlay, peers, MANIFEST.digest)
    assert (publisher, manifest) == (PUBLISHER.peer_id, MANIFEST)
    assert me.overlay.statistics().violations == {first.peer_id: 1}


def test_a_manifest_is_what_its_digest_says() -> None:
    envelope = seal(PUBLISHER, Kind.MANIFEST, MANIFEST.to_bytes())
    assert open_manifest(envelope, MANIFEST.digest) == (PUBLISHER.peer_id, MANIFEST)
    with pytest.raises(TrustError) as raised:
        open_manifest(envelope, "0" * 64)
    assert raised.value.code == "digest_mismatch"
    with pytest.raises(ModelError):
        open_manifest(seal(PUBLISHER, Kind.MANIFEST, b"signed garbage"), MANIFEST.digest)


# --- what is on disk


def test_damaged_manifests_are_left_out(tmp_path: Path) -> None:
    library = Library(tmp_path)
    library.publish(PUBLISHER, MANIFEST)
    library.keep("0" * 64, b"garbage")
    library.keep("1" * 64, seal(PUBLISHER, Kind.MANIFEST, MANIFEST.to_bytes()))  # under another's name
    (tmp_path / "manifests" / f"{'2' * 64}.1.tmp").write_bytes(b"half")
    assert Library(tmp_path).manifests() == ((MANIFEST.digest, MANIFEST),)
    assert library.envelope("3" * 64) is None


@pytest.mark.parametrize(
    ("present", "longest"),
    [("", None), ("a", (0, 1)), ("e", (4, 5)), ("abcde", (0, 5)), ("bcd", (1, 4)), ("abde", (0, 2)), ("acde", (2, 5))],
)
def test_the_longest_cached_range(tmp_path: Path, present: str, longest: tuple[int, int] | None) -> None:
    library = Library(tmp_path)
    manifest = manifest_of(b"a", b"b", b"c", b"d", b"e")
    for letter in present:
        library.store.put_bytes(letter.encode())
    assert library.cached_range(manifest) == longest
