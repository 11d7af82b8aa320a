"""What a library keeps, and manifests with their publishers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from azu.distribution import Library, fetch_manifest, open_manifest
from azu.errors import ModelError, NetworkError, TrustError
from azu.identity import Kind, seal
from tests.distribution.nodes import BIG, PUBLISHER, SECOND, SMALL, Nodes, manifest_of

# --- manifests

MANIFEST = manifest_of(BIG, SMALL)


def is_publisher(peer_id: str) -> bool:
    return peer_id == PUBLISHER.peer_id


async def test_a_manifest_comes_with_its_publisher(nodes: Nodes) -> None:
    me, first, second = nodes
    second.library.publish(PUBLISHER, MANIFEST)
    peers = [first.peer_id, second.peer_id]
    envelope, manifest = await fetch_manifest(me.overlay, peers, MANIFEST.digest, is_trusted=is_publisher)
    assert manifest == MANIFEST
    me.library.keep(MANIFEST.digest, envelope)
    assert me.library.manifests() == ((MANIFEST.digest, MANIFEST),)
    assert not me.overlay.statistics().violations

    # Whoever fetched it may pass it on; the publisher's signature comes along.
    passed_on, _ = await fetch_manifest(second.overlay, [me.peer_id], MANIFEST.digest, is_trusted=is_publisher)
    assert passed_on == envelope


async def test_a_stranger_who_signs_a_manifest_anew_keeps_nobody_from_the_publishers(nodes: Nodes) -> None:
    me, first, second = nodes
    first.library.publish(SECOND, MANIFEST)
    ask = partial(fetch_manifest, me.overlay, digest=MANIFEST.digest, is_trusted=is_publisher)
    with pytest.raises(NetworkError, match=f"signed by {SECOND.peer_id}"):
        await ask([first.peer_id])
    second.library.publish(PUBLISHER, MANIFEST)
    envelope, _ = await ask([first.peer_id, second.peer_id])
    assert envelope == second.library.envelope(MANIFEST.digest)
    assert not me.overlay.statistics().violations, "another publisher may have cut the same model"


async def test_a_manifest_that_nobody_has(nodes: Nodes) -> None:
    me, first, second = nodes
    with pytest.raises(NetworkError) as raised:
        await fetch_manifest(me.overlay, [first.peer_id, second.peer_id], MANIFEST.digest, is_trusted=is_publisher)
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


async def test_a_forged_manifest_is_caught_and_counted(nodes: Nodes) -> None:
    me, first, second = nodes
    second.library.publish(PUBLISHER, MANIFEST)
    peers = [first.peer_id, second.peer_id]
    for number, (forgery, envelope) in enumerate(FORGERIES.items()):
        first.library.keep(MANIFEST.digest, envelope)
        _, manifest = await fetch_manifest(me.overlay, peers, MANIFEST.digest, is_trusted=is_publisher)
        assert manifest == MANIFEST
        assert me.overlay.statistics().violations == {first.peer_id: number + 1}, forgery


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
