"""The manifest: what a model consists of, as SHA-256 digests that a publisher signs.

A manifest is pure data. Its deterministic CBOR hashes to `Manifest.digest`, which names the model everywhere: in job
tickets, in worker records and in the DHT. Whatever arrives from the network goes through `Manifest.from_bytes`, which
either returns a manifest that holds every bound below or raises `ModelError(code="bad_manifest")`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from types import MappingProxyType
from typing import Any

import cbor2

from azu.errors import ModelError
from azu.models.layout import is_head

__all__ = [
    "DTYPE_BYTES",
    "MAX_LAYERS",
    "MAX_MANIFEST_BYTES",
    "PIECE_BYTES",
    "Blob",
    "LayerCache",
    "Manifest",
    "Weights",
    "Workspace",
    "is_digest",
]

MAX_MANIFEST_BYTES = 1 << 20  # 1 MiB: 1,000 layers and as many shared tensors take about 150 KiB
PIECE_BYTES = 4 << 20  # what can be fetched and verified on its own
MAX_LAYERS = 1000  # as a job ticket; the deepest published models have about 130
MAX_SHARED = 1024
MAX_FILES = 4096  # shards of one source; the largest repositories have a few hundred
MAX_BLOB_BYTES = 1 << 39  # 512 GiB, for one layer; its piece list is then a single piece itself
MAX_DIMENSION = 1 << 32  # hidden size, vocabulary, context: far above any model, far below an overflow

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2})

_FORMAT = "azu-manifest"
_VERSION = 3
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,255}")  # file and tensor names; no separators
_DTYPE = re.compile("|".join(DTYPE_BYTES))
_TENSOR_DTYPE = re.compile(r"[A-Z0-9_]{1,16}")  # safetensors' own names
_TEXTS = ("model_id", "revision", "origin", "architecture", "dtype")
_SCALARS = ("n_layers", "hidden_size", "vocab_size", "context_length")
_PARTS = ("config", "tokenizer", "layers", "caches", "workspace", "shared", "sources", "tied")
_FIELDS = frozenset({"format", "version", *_PARTS, *_TEXTS, *_SCALARS})


@dataclass(frozen=True, slots=True)
class Weights:
    """What a safetensors file holds of one dtype (safetensors' name): `nbytes` in all, `matrix_nbytes` of them in
    matrices that a worker may hold as integers (`azu.models.inventory`)."""

    dtype: str
    nbytes: int
    matrix_nbytes: int

    def __post_init__(self) -> None:
        _check_text(self.dtype, _TENSOR_DTYPE, "a tensor's dtype")
        _require(_is_int(self.nbytes, 0, MAX_BLOB_BYTES), "a number of bytes is out of range")
        _require(_is_int(self.matrix_nbytes, 0, self.nbytes), "a number of bytes is out of range")


@dataclass(frozen=True, slots=True)
class Blob:
    """One immutable file.

    Args:
        digest: 64 hex digits: its SHA-256 where it is a single piece, else its list's hash (`azu.models.pieces`).
        size: its length in bytes.
        pieces: the SHA-256 of another blob, its piece list: the SHA-256s (32 bytes each) of its pieces of PIECE_BYTES
            one after the other, so that each can come from another peer and be verified on its own. Empty where the
            file is a single piece.
        weights: what it holds by dtype, in a safetensors file; dtypes ascending.
    """

    digest: str
    size: int
    pieces: str = ""
    weights: tuple[Weights, ...] = ()

    def __post_init__(self) -> None:
        _require(is_digest(self.digest), "a blob's digest is not 64 lower-case hex digits")
        _require(_is_int(self.size, 0, MAX_BLOB_BYTES), "a blob's size is out of range")
        has_list = is_digest(self.pieces) if self.size > PIECE_BYTES else self.pieces == ""
        _require(has_list, "a blob's piece list does not fit its size")
        _require(len(self.weights) <= 16, "a blob has weights of too many dtypes")
        names = [part.dtype for part in self.weights]
        _require(names == sorted(set(names)), "a blob's weights are not in order")
        _require(sum(part.nbytes for part in self.weights) <= self.size, "a blob's weights exceed its size")

    @property
    def piece_list(self) -> Blob | None:
        """The blob that lists its pieces, or None where the file is a single piece."""
        return Blob(self.pieces, 32 * -(-self.size // PIECE_BYTES)) if self.pieces else None


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one decoder layer keeps of one job.

    Args:
        per_token: numbers (keys and values, at the dtype that the stage computes in) for each token.
        window: of how many tokens at most; 0 where of all.
        state_bytes: what it keeps besides however many tokens there are (linear attention, convolutions), in bytes.
    """

    per_token: int
    window: int = 0
    state_bytes: int = 0

    def __post_init__(self) -> None:
        for value in (self.per_token, self.window, self.state_bytes):
            _require(_is_int(value, 0, MAX_DIMENSION), "a layer's cache is out of range")


@dataclass(frozen=True, slots=True)
class Workspace:
    """What running the largest layer takes at its peak, besides its weights and cache (`azu.models.memory`).

    Args:
        mlp, attention: numbers for each row of a chunk, in the feed-forward network and in the attention.
        token: numbers for each token attended to, such as keys repeated for all heads.
        pair: bytes for each row and token: scores and masks.
        tables: bytes that each layer computes as it is loaded; fused: 1 where tensors are then put together (experts).
    """

    mlp: int = 0
    attention: int = 0
    token: int = 0
    pair: int = 0
    tables: int = 0
    fused: int = 0

    def __post_init__(self) -> None:
        _require(all(_is_int(value, 0, MAX_DIMENSION) for value in astuple(self)), "a workspace is out of range")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published model.

    Args:
        model_id: the name that clients ask for, such as "SmolLM2-135M-Instruct" or "owner/name".
        revision: the source's commit, or a hash of the source files where there is none.
        origin: the hub's id of the repository that it was cut from, at `revision`; empty where it came from elsewhere.
        architecture: the transformers class, such as "LlamaForCausalLM".
        dtype: what the layer files hold: "float32", "float16" or "bfloat16".
        n_layers: how many decoder layers there are; equals `len(layers)`.
        hidden_size: the width of the hidden states that travel between stages.
        vocab_size: the width of the logits.
        context_length: the most tokens that the model attends to.
        config: the HF config.json.
        tokenizer: file name to blob, for those of tokenizer.json, tokenizer_config.json and so on that exist.
        layers: one safetensors file per decoder layer.
        caches: what each layer keeps of a job.
        workspace: what running a layer takes.
        shared: tensor name to a safetensors file with that one tensor (embeddings, final norm, head).
        sources: source file name to its SHA-256.
        tied: whether the head is the embedding.

    Attributes:
        digest: the model's identity, SHA-256 of `to_bytes()`: 64 hex digits.

    Raises:
        ModelError: code "bad_manifest", where a field breaks its bounds.
    """

    model_id: str
    revision: str
    origin: str
    architecture: str
    dtype: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    config: Blob
    tokenizer: Mapping[str, Blob]
    layers: tuple[Blob, ...]
    caches: tuple[LayerCache, ...]
    shared: Mapping[str, Blob]
    sources: Mapping[str, str]
    tied: bool
    workspace: Workspace = field(default_factory=Workspace)
    digest: str = field(init=False, repr=False, compare=False)
    _encoded: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_text(self.model_id, _MODEL_ID, "model_id")
        _check_text(self.revision, _REVISION, "revision")
        if self.origin != "":
            _check_text(self.origin, _MODEL_ID, "origin")
        _check_text(self.architecture, _NAME, "architecture")
        _check_text(self.dtype, _DTYPE, "dtype")
        for name in _SCALARS:
            _require(_is_int(getattr(self, name), 1, MAX_DIMENSION), f"{name} is out of range")
        _require(1 <= self.n_layers <= MAX_LAYERS and self.n_layers == len(self.layers), "n_layers does not fit layers")
        _require(len(self.caches) == self.n_layers, "n_layers does not fit caches")
        _require(isinstance(self.tied, bool), "tied is not a boolean")
        _check_names(self.tokenizer, MAX_SHARED, "tokenizer")
        _check_names(self.shared, MAX_SHARED, "shared")
        _check_names(self.sources, MAX_FILES, "sources")
        _require(all(is_digest(value) for value in self.sources.values()), "a source's digest is malformed")
        for name in ("tokenizer", "shared", "sources"):  # frozen through and through: the digest must not drift
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "_encoded", _encode(self))
        object.__setattr__(self, "digest", hashlib.sha256(self._encoded).hexdigest())
        _require(len(self._encoded) <= MAX_MANIFEST_BYTES, f"it is larger than {MAX_MANIFEST_BYTES} bytes")

    def __hash__(self) -> int:
        return hash(self._encoded)

    def to_bytes(self) -> bytes:
        """Returns the deterministic CBOR that is hashed, signed and sent."""
        return self._encoded

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Decodes a manifest from anywhere.

        Raises:
            ModelError: code "bad_manifest", where the bytes are not exactly what `to_bytes` makes of a valid manifest.
        """
        _require(len(data) <= MAX_MANIFEST_BYTES, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
        fields = _decode(data)
        manifest = cls(
            **{name: fields[name] for name in (*_TEXTS, "tied", *_SCALARS)},
            config=_blob(fields["config"]),
            tokenizer=_blobs(fields["tokenizer"]),
            layers=tuple(_blob(item) for item in _sequence(fields["layers"])),
            caches=tuple(_cache(item) for item in _sequence(fields["caches"])),
            shared=_blobs(fields["shared"]),
            sources=_mapping(fields["sources"]),
            workspace=Workspace(*_row(fields["workspace"], 6)),
        )
        # One model has one digest: bytes that decode to the same fields but differ are refused.
        _require(manifest._encoded == bytes(data), "it is not in canonical form")
        return manifest

    def blobs(self) -> Iterator[Blob]:
        """Yields every file of the model, without the piece lists."""
        yield self.config
        yield from self.tokenizer.values()
        yield from self.layers
        yield from self.shared.values()

    def blobs_for(self, start: int, end: int, shared_names: Iterable[str]) -> dict[str, Blob]:
        """Returns what a stage of layers start..end (end exclusive) fetches, as label to blob.

        Args:
            shared_names: state-dict names that the stage needs besides its layers (`splice.stage_tensor_names`). A
                checkpoint may lack or carry the base model's prefix ("wte.weight" for "transformer.wte.weight").

        Raises:
            ModelError: where the range does not fit or a shared tensor is missing.
        """
        if not 0 <= start < end <= self.n_layers:
            raise ModelError(f"layers {start}..{end} do not lie in a model of {self.n_layers}", code="bad_layer_range")
        blobs = {f"layers.{index}": self.layers[index] for index in range(start, end)}
        for name in shared_names:
            found = self.shared_name(name)
            if found is None:
                raise ModelError(f"manifest of {self.model_id} has no tensor {name}", code="missing_tensor")
            blobs[found] = self.shared[found]
        return blobs

    def shared_name(self, name: str) -> str | None:
        """Returns the name in `shared` of a state-dict name, with or without its leading prefix; None if absent."""
        if name in self.shared:
            return name
        near = [known for known in self.shared if known.endswith(f".{name}") or name.endswith(f".{known}")]
        if not near and is_head(name):  # families rename their head between releases
            near = [known for known in self.shared if is_head(known)]
        return near[0] if len(near) == 1 else None


def is_digest(value: object) -> bool:
    """Returns whether `value` is a SHA-256 as 64 lower-case hex digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _encode(manifest: Manifest) -> bytes:
    blobs = {
        name: {key: _plain_blob(blob) for key, blob in getattr(manifest, name).items()}
        for name in ("tokenizer", "shared")
    }
    scalars = {name: getattr(manifest, name) for name in (*_TEXTS, "tied", *_SCALARS)}
    value = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": _plain_blob(manifest.config),
        "layers": [_plain_blob(blob) for blob in manifest.layers],
        "caches": [[cache.per_token, cache.window, cache.state_bytes] for cache in manifest.caches],
        "workspace": list(astuple(manifest.workspace)),
        "sources": dict(manifest.sources),
        **scalars,
        **blobs,
    }
    return cbor2.dumps(value, canonical=True)


def _plain_blob(blob: Blob) -> list[Any]:
    weights = [[part.dtype, part.nbytes, part.matrix_nbytes] for part in blob.weights]
    return [blob.digest, blob.size, blob.pieces, weights]


def _decode(data: bytes) -> dict[str, Any]:
    try:
        # No tags at all: cbor2's built-in ones reach regular expressions, huge powers of ten and shared references.
        value = cbor2.loads(
            data,
            semantic_decoders=dict.fromkeys(_BUILT_IN_TAGS, _refuse_tag),
            tag_hook=_refuse_tag,
            max_depth=6,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise _bad(f"not CBOR ({type(error).__name__})") from error
    _require(isinstance(value, dict), "it is not a map")
    _require(value.get("format") == _FORMAT and value.get("version") == _VERSION, "unknown format or version")
    _require(set(value) == _FIELDS, f"its fields are not those of version {_VERSION}")
    fields: dict[str, Any] = value
    return fields


_BUILT_IN_TAGS = (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799)


def _refuse_tag(*_: object) -> object:
    raise _bad("CBOR tags are not allowed")


def _blob(value: object) -> Blob:
    digest, size, pieces, weights = _row(value, 4)
    return Blob(digest, size, pieces, tuple(Weights(*_row(part, 3)) for part in _sequence(weights)))


def _cache(value: object) -> LayerCache:
    return LayerCache(*_row(value, 3))


def _row(value: object, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise _bad(f"a list of {length} is expected")
    return value


def _blobs(value: object) -> dict[str, Blob]:
    return {key: _blob(item) for key, item in _mapping(value).items()}


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad("a map is expected")
    return value


def _sequence(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        raise _bad("a list is expected, or it is too long")
    return value


def _check_text(value: object, pattern: re.Pattern[str], name: str) -> None:
    fits = isinstance(value, str) and pattern.fullmatch(value) is not None and ".." not in value
    _require(fits, f"{name} is malformed")


def _check_names(value: object, most: int, name: str) -> None:
    if not isinstance(value, Mapping) or len(value) > most:
        raise _bad(f"{name} is not a map, or too long")
    for key in value:
        _check_text(key, _NAME, f"a name in {name}")


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _bad(problem)


def _bad(problem: str) -> ModelError:
    remedy = "Ask the publisher to publish it again."
    return ModelError(f"bad manifest: {problem}", code="bad_manifest", remedy=remedy)
