"""A manifest survives its bytes, hashes to one digest, and refuses whatever is not one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azu.errors import ModelError
from azu.models.manifest import MAX_MANIFEST_BYTES, PIECE_BYTES, Blob, LayerCache, Manifest, Weights

shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
caches = st.builds(LayerCache, st.integers(0, 1 << 32), st.integers(0, 1 << 32), st.integers(0, 1 << 32))
names = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_-]|\.(?!\.)){0,40}", fullmatch=True)
positive = st.integers(1, 1 << 32)


@st.composite
def blobs_(draw: st.DrawFn) -> Blob:
    size = draw(st.integers(0, 1 << 39))
    pieces = draw(digests) if size > PIECE_BYTES else ""
    weights, left = [], size
    for dtype in sorted(draw(st.sets(st.sampled_from(["BF16", "F16", "F32", "I64"])))):
        nbytes = draw(st.integers(0, left))
        weights.append(Weights(dtype, nbytes, draw(st.integers(0, nbytes))))
        left -= nbytes
    return Blob(draw(digests), size, pieces, tuple(weights))


blobs = blobs_()


@contextmanager
def only_bad_manifest() -> Iterator[None]:
    """Whatever is inside may be refused, in this one way."""
    try:
        yield
    except ModelError as error:
        if error.code != "bad_manifest":
            raise


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    layers = draw(st.lists(blobs, min_size=1, max_size=6))
    return Manifest(
        model_id=draw(st.from_regex(r"[A-Za-z0-9]{1,20}(/[A-Za-z0-9]{1,20})?", fullmatch=True)),
        revision=draw(st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True)),
        origin=draw(st.sampled_from(["", "owner/name"])),
        architecture="LlamaForCausalLM",
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        n_layers=len(layers),
        hidden_size=draw(positive),
        vocab_size=draw(positive),
        context_length=draw(positive),
        config=draw(blobs),
        tokenizer=draw(st.dictionaries(names, blobs, max_size=4)),
        layers=tuple(layers),
        caches=tuple(draw(st.lists(caches, min_size=len(layers), max_size=len(layers)))),
        shared=draw(st.dictionaries(names, blobs, max_size=4)),
        sources=draw(st.dictionaries(names, digests, max_size=4)),
        tied=draw(st.booleans()),
    )


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert hash(again) == hash(manifest)
    assert again.to_bytes() == data
    assert again.digest == hashlib.sha256(data).hexdigest()


def test_the_digest_does_not_depend_on_the_order_of_names(manifest: Manifest) -> None:
    backwards = dict(reversed(list(manifest.shared.items())))
    assert dataclasses.replace(manifest, shared=backwards).digest == manifest.digest


def test_a_manifest_cannot_drift(manifest: Manifest) -> None:
    with pytest.raises(TypeError):
        manifest.shared["x"] = manifest.config  # type: ignore[index]  # that it is refused is the point
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.tied = True  # type: ignore[misc]  # that it is refused is the point


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        Manifest.from_bytes(data)
    assert caught.value.code == "bad_manifest"


@shared_fixture
@given(position=st.integers(0), value=st.integers(0, 255))
def test_a_changed_byte_gives_another_manifest_or_none(manifest: Manifest, position: int, value: int) -> None:
    data = bytearray(manifest.to_bytes())
    data[position % len(data)] = value
    with only_bad_manifest():
        assert Manifest.from_bytes(bytes(data)).to_bytes() == bytes(data)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@shared_fixture
@given(
    field=st.sampled_from([*(f.name for f in dataclasses.fields(Manifest) if f.init), "version", "new"]),
    value=json_like,
)
def test_any_value_in_any_field(manifest: Manifest, field: str, value: Any) -> None:
    fields = cbor2.loads(manifest.to_bytes())
    data = cbor2.dumps({**fields, field: value}, canonical=True)
    with only_bad_manifest():
        assert Manifest.from_bytes(data).to_bytes() == data


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 3),
        ("n_layers", True),
        ("hidden_size", 0),
        ("vocab_size", 1 << 33),
        ("dtype", "int8"),
        ("model_id", "../etc"),
        ("model_id", "a/b/c"),
        ("revision", "refs/heads"),
        ("tokenizer", {"../../x": ["0" * 64, 1, "", []]}),
        ("tokenizer", {"a/b": ["0" * 64, 1, "", []]}),
        ("tokenizer", {"a..b": ["0" * 64, 1, "", []]}),
        ("shared", {"x": ["0" * 63, 1, "", []]}),
        ("shared", {"x": ["A" * 64, 1, "", []]}),
        ("shared", {"x": ["0" * 64, -1, "", []]}),
        ("shared", {"x": ["0" * 64, 1.0, "", []]}),
        ("sources", {"x": "../../../etc/passwd"}),
        ("layers", []),
        ("layers", [["0" * 64, 1, "", []]] * 3),
        ("layers", [["0" * 64, 1 << 23, "", []]] * 4),
        ("layers", [["0" * 64, 1, "0" * 64, []]] * 4),
        ("layers", [["0" * 64, 9, "", [["F32", 4, 8]]]] * 4),
        ("layers", [["0" * 64, 9, "", [["F32", 4, 4], ["F32", 4, 4]]]] * 4),
        ("layers", [["0" * 64, 9, "", [["F16", 8, 4], ["F32", 8, 4]]]] * 4),
        ("layers", [["0" * 64, 9, "", [["../F", 4, 4]]]] * 4),
        ("caches", [[1, 0, 0]] * 3),
        ("caches", [[1, 0, -1]] * 4),
        ("caches", [[1, 0]] * 4),
        ("origin", "../x"),
        ("tied", 1),
        ("version", 1),
    ],
)
def test_bounds(manifest: Manifest, field: str, value: Any) -> None:
    fields = cbor2.loads(manifest.to_bytes())
    with pytest.raises(ModelError, match="bad manifest"):
        Manifest.from_bytes(cbor2.dumps({**fields, field: value}, canonical=True))


def test_forms_that_would_give_one_model_two_digests(manifest: Manifest) -> None:
    fields = cbor2.loads(manifest.to_bytes())
    backwards = cbor2.dumps(dict(reversed(fields.items())))
    for data in (backwards, manifest.to_bytes() + b"\0", cbor2.dumps(cbor2.CBORTag(55799, fields), canonical=True)):
        with pytest.raises(ModelError):
            Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x81" * 100_000,
        b"\xbb" + b"\xff" * 8,
        b"\x9f" * 50,
        b"\xd8\x1c" * 1000,
        b"\0" * (MAX_MANIFEST_BYTES + 1),
        bytes.fromhex("c48221196ab3"),  # a decimal fraction
        bytes.fromhex("c4821b7fffffffffffffff01"),  # ten to the power of 2**63
        bytes.fromhex("d82363282b29"),  # a regular expression
    ],
    ids=range(8),
)
def test_bombs(data: bytes) -> None:
    with pytest.raises(ModelError, match="bad manifest"):
        Manifest.from_bytes(data)


def test_blobs_of_a_stage(manifest: Manifest) -> None:
    blobs = manifest.blobs_for(2, 4, ["model.norm.weight", "lm_head.weight"])
    assert list(blobs) == ["layers.2", "layers.3", "model.norm.weight", "lm_head.weight"]
    assert blobs["layers.3"] == manifest.layers[3]


def test_shared_names_with_and_without_their_prefix(manifest: Manifest) -> None:
    assert manifest.shared_name("embed_tokens.weight") == "model.embed_tokens.weight"
    assert manifest.shared_name("outer.model.norm.weight") == "model.norm.weight"
    assert manifest.shared_name("embed_out.weight") == "lm_head.weight"
    assert manifest.shared_name("weight") is None  # three candidates
    assert manifest.shared_name("wpe.weight") is None


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_ranges_outside_the_model(manifest: Manifest, start: int, end: int) -> None:
    with pytest.raises(ModelError) as caught:
        manifest.blobs_for(start, end, [])
    assert caught.value.code == "bad_layer_range"


def test_missing_shared_tensor(manifest: Manifest) -> None:
    with pytest.raises(ModelError) as caught:
        manifest.blobs_for(0, 1, ["transformer.wpe.weight"])
    assert caught.value.code == "missing_tensor"


@given(blobs)
def test_a_piece_list_has_none_itself(blob: Blob) -> None:
    assert blob.piece_list is None or blob.piece_list.piece_list is None
