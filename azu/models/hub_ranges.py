"""Single files of a published model, rebuilt from the hub's repository that it was cut from.

Only the ranges of the original safetensors files that a layer consists of are fetched. Cut as publishing cuts them
(azu.models.publish), they give the very bytes that the manifest names, and anything else is refused: a hub, or whoever
it redirects to, can make this fail and no more. It needs no torch, and memory stays flat.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

from azu.errors import InputError, ModelError, TrustError
from azu.models.directory_source import INDEX, choose_weights, read_index
from azu.models.hub import hub_errors
from azu.models.hub_http import Retries, request_file
from azu.models.layout import Layout, find_layout
from azu.models.manifest import Blob, Manifest
from azu.models.safetensors_file import MAX_HEADER_BYTES, TensorInfo, TensorSpec, parse_header, serialize
from azu.models.source import MAX_JSON_BYTES
from azu.models.store import LayerStore

__all__ = ["HubRanges"]

_PAUSES = (1.0, 2.0, 4.0)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes start..end of a source file."""

    name: str
    start: int
    end: int


class HubRanges:
    """The repository of one manifest. Its methods block; use it from one thread at a time.

    Args:
        manifest: with an `origin`.
        check: called between two chunks, and told how many bytes have come; what it raises ends the transfer.
    """

    def __init__(self, manifest: Manifest, store: LayerStore, check: Callable[[int], None]) -> None:
        self._manifest = manifest
        self._store = store
        self._check = check
        self._headers: dict[str, Mapping[str, TensorInfo]] = {}
        self._came = 0  # bytes of the file at hand

    def owner(self, blob: Blob) -> Blob:
        """The file that a piece list belongs to, which alone gives it; any other file is its own."""
        return next((each for each in self._manifest.blobs() if blob.digest == each.pieces), blob)

    def fetch(self, blob: Blob) -> Blob:
        """Brings one of the manifest's files into the store, with its piece list; asked for the list, it brings both.

        What an earlier transfer left, that was ended or killed, is not fetched again.

        Returns:
            the file that came, `owner(blob)`.

        Raises:
            TrustError: the hub sends other bytes than were published, or more or fewer; nothing is stored.
            ModelError: what it sends is malformed, or the file is none of this model's.
            InputError, NetworkError: as `azu.models.hub`. InternalError: code "storage".
        """
        blob = self.owner(blob)
        stored = self._store.put_resumed(blob, partial(self._chunks, blob))
        if stored.pieces != blob.pieces:
            problem = f"the piece list of blob {blob.digest} belongs to other bytes"
            raise ModelError(problem, code="bad_manifest", remedy="The model has to be published again.")
        return blob

    def _chunks(self, blob: Blob, offset: int) -> Iterator[bytes]:
        # Mapped in here: to whoever consumes this, the HTTP client's errors, being OSErrors, would be the disk's.
        try:
            with hub_errors(self._manifest.origin, self._manifest.revision):
                yield from self._content(blob, offset)
        except InputError as error:
            remedy = "Without a peer that has the files, only public repositories help: no token is sent here."
            raise InputError(error.message, code=error.code, remedy=remedy) from error

    def _content(self, blob: Blob, offset: int) -> Iterator[bytes]:
        """A file's bytes from `offset` on."""
        self._came = 0
        header, runs = self._made_of(blob)
        for part in self._from(offset, header, runs):
            self._came += len(part)
            yield part

    def _from(self, offset: int, header: bytes, runs: Iterable[_Run]) -> Iterator[bytes]:
        yield header[offset:]
        skipped = max(0, offset - len(header))
        for run in runs:
            yield from self._stream(replace(run, start=min(run.start + skipped, run.end)))
            skipped = max(0, skipped - (run.end - run.start))

    def _made_of(self, blob: Blob) -> tuple[bytes, Iterable[_Run]]:
        """A file as bytes of our own, and what follows them from the hub."""
        texts = {self._manifest.config.digest: "config.json"}
        texts |= {text.digest: name for name, text in self._manifest.tokenizer.items()}
        if blob.digest in texts:
            return b"", [_Run(texts[blob.digest], 0, blob.size)]
        return self._tensors(self._names(blob))

    def _names(self, blob: Blob) -> tuple[str, ...]:
        for index, layer in enumerate(self._manifest.layers):
            if layer.digest == blob.digest:
                return self._layout.layers[index]
        for name, shared in self._manifest.shared.items():
            if shared.digest == blob.digest:
                return (name,)
        raise ModelError(f"blob {blob.digest} cannot be had from the hub", code="missing_blob")

    def _tensors(self, names: tuple[str, ...]) -> tuple[bytes, Iterable[_Run]]:
        """A file with these tensors, as `serialize` lays it out: its header, which comes before it reads a tensor."""
        found = {name: self._find(name) for name in sorted(names)}
        specs = [TensorSpec(info.name, info.dtype, info.shape) for _, info in found.values()]
        return bytes(next(serialize(specs, lambda _: ()))), _runs(found)

    def _find(self, tensor: str) -> tuple[str, TensorInfo]:
        for name, tensors in self._shards.items():
            if tensors is None or tensor in tensors:
                info = self._header(name).get(tensor)
                if info is not None:
                    return name, info
        raise ModelError(f"the hub's files have no tensor {tensor}", code="missing_tensor")

    @cached_property
    def _shards(self) -> Mapping[str, frozenset[str] | None]:
        """The files with weights, and which tensors each has where an index says so."""
        sources = self._manifest.sources
        chosen = choose_weights(self._manifest.origin, sources)
        if chosen != INDEX:
            return {chosen: None}
        raw = self._whole(INDEX, MAX_JSON_BYTES)
        if hashlib.sha256(raw).hexdigest() != sources[INDEX]:
            raise TrustError(f"{INDEX} on the hub is not the one that was published", code="digest_mismatch")
        return read_index(raw)

    @cached_property
    def _layout(self) -> Layout:
        names = [name for shard, listed in self._shards.items() for name in listed or self._header(shard)]
        return find_layout(names, self._manifest.n_layers)

    def _header(self, name: str) -> Mapping[str, TensorInfo]:
        if name not in self._headers:
            size, prefix = self._begin(name)
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER_BYTES, size):  # before it is fetched
                raise ModelError(f"{name} on the hub has no safetensors header", code="bad_safetensors")
            header = prefix + b"".join(self._stream(_Run(name, len(prefix), len(prefix) + length)))
            self._headers[name] = parse_header(header, size)
        return self._headers[name]

    def _begin(self, name: str) -> tuple[int, bytes]:
        """A file's size and its first 8 bytes."""
        with self._open(_Run(name, 0, 8)) as (response, size):
            return size, b"".join(_exactly(response, _Run(name, 0, 8)))

    def _whole(self, name: str, limit: int) -> bytes:
        size, prefix = self._begin(name)
        if size > limit:
            raise ModelError(f"{name} on the hub has {size} bytes", code="bad_json")
        return prefix + b"".join(self._stream(_Run(name, len(prefix), size)))

    def _stream(self, run: _Run) -> Iterator[bytes]:
        """The bytes of a run, taken up again where a transfer breaks."""
        at, retries = run.start, Retries(_PAUSES)
        while at < run.end:
            rest = _Run(run.name, at, run.end)
            try:
                with self._open(rest) as (response, _):
                    for chunk in _exactly(response, rest):
                        self._check(self._came)
                        at += len(chunk)
                        yield chunk
            except (HfHubHTTPError, httpx2.TransportError) as error:
                self._check(self._came)
                retries.pause(error, moved=at > rest.start)

    @contextmanager
    def _open(self, run: _Run) -> Iterator[tuple[httpx2.Response, int]]:
        """A response with exactly these bytes to come, and the size of the whole file."""
        repo_id, commit = self._manifest.origin, self._manifest.revision
        # Without the owner's token: a publisher names the repository, and what it gives is handed to everybody.
        with request_file(repo_id, run.name, commit, f"{run.start}-{run.end - 1}", token=False) as response:
            hf_raise_for_status(response)
            sent = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if sent is None or (int(sent[1]), int(sent[2])) != (run.start, run.end - 1):
                raise _other_bytes(run)
            yield response, int(sent[3])


def _exactly(response: httpx2.Response, run: _Run) -> Iterator[bytes]:
    left = run.end - run.start
    for chunk in response.iter_raw():
        left -= len(chunk)
        if left < 0:
            raise _other_bytes(run)
        yield chunk
    if left:
        raise httpx2.RemoteProtocolError(f"{run.name} broke off")


def _other_bytes(run: _Run) -> TrustError:
    return TrustError(
        f"the hub does not send bytes {run.start} to {run.end} of {run.name}",
        code="size_mismatch",
        remedy="The repository may have changed, or something between here and the hub changes files.",
    )


def _runs(found: Mapping[str, tuple[str, TensorInfo]]) -> Iterator[_Run]:
    """Where the tensors lie, in their order; those that follow one another in one file as a single run."""
    run: _Run | None = None
    for name, info in found.values():
        if run is not None and (run.name, run.end) == (name, info.start):
            run = _Run(name, run.start, info.end)
            continue
        if run is not None:
            yield run
        run = _Run(name, info.start, info.end)
    if run is not None:
        yield run
