"""Pieces in any order, from several threads, over crashes: a blob is whole and right, or is not there."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import ModelError, TrustError
from azu.models.manifest import PIECE_BYTES, Blob
from azu.models.pieces import PieceHasher, blob_digest, piece_count, piece_digests, piece_span
from azu.models.store import LayerStore

DATA = hashlib.shake_256(b"a layer").digest(3 * PIECE_BYTES + 777)


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path)


def piece(index: int) -> bytes:
    offset, length = piece_span(len(DATA), index)
    return DATA[offset : offset + length]


DIGESTS = [hashlib.sha256(piece(index)).digest() for index in range(4)]
BLOB = Blob(blob_digest(len(DATA), b"".join(DIGESTS)), len(DATA), hashlib.sha256(b"".join(DIGESTS)).hexdigest())


def unfinished(store: LayerStore) -> Path:
    return store.root / "partial" / BLOB.digest


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 1, 0, 2, 3, 0)])
def test_pieces_may_come_in_any_order_and_again(store: LayerStore, order: tuple[int, ...]) -> None:
    with store.incoming(BLOB, DIGESTS) as incoming:
        for index in order:
            incoming.write(index, piece(index))
        assert not incoming.missing
        incoming.commit()
    assert store.path(BLOB.digest).read_bytes() == DATA
    assert not unfinished(store).exists()


def test_pieces_may_come_from_several_threads(store: LayerStore) -> None:
    with store.incoming(BLOB, DIGESTS) as incoming:
        threads = [threading.Thread(target=incoming.write, args=(index, piece(index))) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        incoming.commit()
    assert store.verify(BLOB.digest)


def test_a_wrong_piece_is_not_written(store: LayerStore) -> None:
    with store.incoming(BLOB, DIGESTS) as incoming:
        for wrong in (piece(0), piece(1)[:-1], piece(1) + b"x", b""):
            with pytest.raises(TrustError) as raised:
                incoming.write(1, wrong)
            assert raised.value.code == "digest_mismatch"
        assert unfinished(store).stat().st_size == 0
        with pytest.raises(TrustError) as raised:
            incoming.commit()
        assert raised.value.code == "size_mismatch"
    assert not store.has(BLOB.digest)


def test_resuming_takes_what_is_right(store: LayerStore) -> None:
    with store.incoming(BLOB, DIGESTS) as incoming:
        for index in (0, 3):
            incoming.write(index, piece(index))
    with LayerStore(store.root).incoming(BLOB, DIGESTS) as incoming:
        assert incoming.missing == {1, 2}
        for index in (2, 1):
            incoming.write(index, piece(index))
        incoming.commit()
    assert store.verify(BLOB.digest)


@pytest.mark.parametrize("left", [DATA[:1_000], bytes(len(DATA)), DATA[:PIECE_BYTES] + bytes(9), b"x" + DATA + b"more"])
def test_resuming_trusts_nothing_that_a_crash_left(store: LayerStore, left: bytes) -> None:
    unfinished(store).write_bytes(left)
    right = {index for index in range(4) if left[slice(*_slice(index))] == piece(index)}
    with store.incoming(BLOB, DIGESTS) as incoming:
        assert incoming.missing == {0, 1, 2, 3} - right
        for index in sorted(incoming.missing):
            incoming.write(index, piece(index))
        incoming.commit()
    assert store.path(BLOB.digest).read_bytes() == DATA


def _slice(index: int) -> tuple[int, int]:
    offset, length = piece_span(len(DATA), index)
    return offset, offset + length


# --- pieces


@given(cuts=st.lists(st.integers(0, len(DATA)), max_size=6))
def test_a_hasher_sees_no_chunks(cuts: list[int]) -> None:
    hasher = PieceHasher()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(DATA)], strict=True):
        hasher.update(memoryview(DATA)[start:end])
    assert (hasher.size, hasher.digest, hasher.piece_list) == (len(DATA), BLOB.digest, b"".join(DIGESTS))


@pytest.mark.parametrize(
    ("size", "count", "last"),
    [(0, 1, 0), (1, 1, 1), (PIECE_BYTES, 1, PIECE_BYTES), (PIECE_BYTES + 1, 2, 1), (3 * PIECE_BYTES, 3, PIECE_BYTES)],
)
def test_spans(size: int, count: int, last: int) -> None:
    assert piece_count(size) == count
    assert piece_span(size, count - 1) == ((count - 1) * PIECE_BYTES, last)
    assert len(PieceHasher().piece_list) == 0


def test_a_single_piece_is_its_own_list() -> None:
    small = Blob(hashlib.sha256(b"small").hexdigest(), 5)
    assert piece_digests(small, b"") == (hashlib.sha256(b"small").digest(),)
    assert list(piece_digests(BLOB, b"".join(DIGESTS))) == DIGESTS


@pytest.mark.parametrize(
    ("blob", "digests"),
    [
        (BLOB, DIGESTS[:3]),
        (BLOB, [*DIGESTS[:3], DIGESTS[0]]),
        (Blob(BLOB.digest, len(DATA) - 1, BLOB.pieces), DIGESTS),
        (Blob("0" * 64, len(DATA), BLOB.pieces), DIGESTS),
    ],
    ids=["too short", "of other bytes", "of another size", "of another blob"],
)
def test_a_list_that_is_not_the_blobs(blob: Blob, digests: list[bytes]) -> None:
    with pytest.raises(ModelError) as raised:
        piece_digests(blob, b"".join(digests))
    assert raised.value.code == "bad_manifest"


def test_no_small_file_has_the_digest_of_a_large_one(store: LayerStore) -> None:
    for crafted in (b"".join(DIGESTS), len(DATA).to_bytes(8) + b"".join(DIGESTS)):
        assert store.put_bytes(crafted).digest != BLOB.digest
