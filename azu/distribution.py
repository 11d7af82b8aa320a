"""How manifests and layer files get from who has them to who needs them: /azu/layers/1, both ends.

A file is named by its SHA-256 and checked while it streams in, so it does not matter who sends it. A manifest comes in
its publisher's signed envelope.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio

from azu.channel import IDLE_S, Channel, refusal_of
from azu.dialing import open_worker_stream
from azu.errors import AzuError, InternalError, ModelError, NetworkError, ProtocolError, TrustError
from azu.identity import MAX_ENVELOPE_BYTES, Identity, Kind, open_envelope, seal
from azu.logs import log
from azu.models.manifest import Blob, Manifest
from azu.models.store import LayerStore
from azu.overlay import Overlay, OverlayStream
from azu.wire.messages import (
    LAYERS,
    LAYERS_PROTOCOL,
    MAX_PART_BYTES,
    BlobPart,
    GetBlob,
    GetManifest,
    ManifestReply,
    Message,
    Refused,
)

__all__ = ["Library", "fetch_blobs", "fetch_manifest", "serve_layers"]

logger = logging.getLogger(__name__)

# A holder that sends nothing for this long is given up for another one.
_STALL_S = 30.0


class Library:
    """What a node has on disk: layer files by digest, and the manifests they belong to."""

    def __init__(self, root: Path) -> None:
        self.store = LayerStore(root / "layers")
        self._manifests = root / "manifests"
        try:
            self._manifests.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InternalError(
                f"{self._manifests} cannot be made: {error.strerror}", remedy="Give --data-dir a writable folder"
            ) from error

    def publish(self, identity: Identity, manifest: Manifest) -> None:
        """Sign a manifest as its publisher and keep it."""
        self.keep(manifest.digest, seal(identity, Kind.MANIFEST, manifest.to_bytes()))

    def keep(self, digest: str, envelope: bytes) -> None:
        """Keep a checked manifest's envelope."""
        path = self._manifests / digest
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_bytes(envelope)
            temporary.replace(path)
        except OSError as error:
            raise InternalError(f"{path} cannot be written: {error.strerror}", remedy="Free some disk space") from error

    def envelope(self, digest: str) -> bytes | None:
        """A kept manifest's envelope; `digest` has been validated as 64 hex digits by the wire's schema."""
        try:
            return (self._manifests / digest).read_bytes()
        except OSError:
            return None

    def manifests(self) -> tuple[tuple[str, Manifest], ...]:
        """(digest, manifest) of all that are kept; a damaged one is left out and logged."""
        found: list[tuple[str, Manifest]] = []
        for path in sorted(self._manifests.iterdir()):
            if path.suffix:
                continue
            try:
                found.append((path.name, open_manifest(path.read_bytes(), path.name)[1]))
            except (AzuError, OSError) as error:
                log(logger, logging.WARNING, "damaged manifest ignored", path=path, reason=str(error))
        return tuple(found)

    def cached_range(self, manifest: Manifest) -> tuple[int, int] | None:
        """The longest [start, end) of a model's layers whose files are all here, or None."""
        best, start = (0, 0), 0
        for index, blob in enumerate(manifest.layers):
            if not self.store.has(blob.digest):
                start = index + 1
            elif index + 1 - start > best[1] - best[0]:
                best = (start, index + 1)
        return best if best[1] else None


def open_manifest(envelope: bytes, digest: str) -> tuple[str, Manifest]:
    """The publisher's peer id and the manifest.

    Raises:
        TrustError: signature or digest does not hold.
        ModelError: the content is not a manifest.
    """
    signed = open_envelope(envelope, Kind.MANIFEST)
    manifest = Manifest.from_bytes(signed.payload)
    if manifest.digest != digest:
        raise TrustError(f"a manifest's digest is {manifest.digest[:12]}, not {digest[:12]}", code="digest_mismatch")
    return signed.peer_id, manifest


async def serve_layers(library: Library, stream: OverlayStream) -> None:
    """Answer one peer's requests for manifests and files until it ends the stream."""
    channel = Channel(stream, LAYERS, max_body=0)
    while (received := await channel.receive(IDLE_S)) is not None:
        request, _ = received
        try:
            await _answer(library, channel, request)
        except (ModelError, InternalError) as error:
            await channel.send(refusal_of(error))


async def _answer(library: Library, channel: Channel, request: Message) -> None:
    if isinstance(request, GetManifest):
        envelope = library.envelope(request.digest)
        if envelope is None:
            await channel.send(Refused(code="not_here", message="this manifest is not here"))
        else:
            await channel.send(ManifestReply(), envelope)
    elif isinstance(request, GetBlob):
        await _send_blob(library.store, channel, request)
    else:
        raise ProtocolError(f"{type(request).__name__} is not a request", code="unexpected_message")


async def _send_blob(store: LayerStore, channel: Channel, request: GetBlob) -> None:
    if not store.has(request.digest):
        await channel.send(Refused(code="not_here", message="this file is not here"))
        return
    size = store.size(request.digest)
    offset = min(request.offset, size)
    while True:
        length = min(MAX_PART_BYTES, size - offset)
        data = await trio.to_thread.run_sync(store.read, request.digest, offset, length)
        await channel.send(BlobPart(offset=offset, size=size), data)
        offset += length
        if offset >= size:
            return


async def fetch_manifest(overlay: Overlay, peers: Sequence[str], digest: str) -> tuple[bytes, str, Manifest]:
    """A manifest from the first of `peers` that has it: its envelope, its publisher's peer id, and itself.

    Raises:
        NetworkError: none of them has it.
    """
    faults: list[str] = []
    for peer_id in peers:
        try:
            stream = await open_worker_stream(overlay, peer_id, LAYERS_PROTOCOL)
            async with stream:
                channel = Channel(stream, LAYERS, max_body=MAX_ENVELOPE_BYTES)
                await channel.send(GetManifest(digest=digest))
                with trio.fail_after(_STALL_S):
                    _, body = await channel.expect(ManifestReply)
            return bytes(body), *open_manifest(bytes(body), digest)
        except (AzuError, trio.TooSlowError) as error:
            _note_fault(overlay, faults, peer_id, error)
    raise _nobody_has(f"manifest {digest[:12]}", faults)


async def fetch_blobs(
    overlay: Overlay,
    peers: Sequence[str],
    store: LayerStore,
    blobs: Iterable[Blob],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Bring files into the store, from the first of `peers` that has each; those already there are not asked for.

    Args:
        progress: told the bytes that came in, as they do.

    Raises:
        NetworkError: no peer has some file, or all broke off.
        InternalError: the disk is full.
    """
    wanted = [blob for blob in blobs if not store.has(blob.digest)]
    faults: list[str] = []
    for peer_id in peers:
        try:
            if wanted:
                wanted = await _fetch_from(overlay, peer_id, store, wanted, progress)
        except (NetworkError, ProtocolError, TrustError, trio.TooSlowError) as error:
            wanted = [blob for blob in wanted if not store.has(blob.digest)]
            _note_fault(overlay, faults, peer_id, error)
    if wanted:
        raise _nobody_has(f"{len(wanted)} layer files", faults)


async def _fetch_from(
    overlay: Overlay,
    peer_id: str,
    store: LayerStore,
    wanted: Sequence[Blob],
    progress: Callable[[int], None] | None,
) -> list[Blob]:
    """Fetch what this peer has; return what it has not."""
    stream = await open_worker_stream(overlay, peer_id, LAYERS_PROTOCOL)
    async with stream:
        channel = Channel(stream, LAYERS, max_body=MAX_PART_BYTES)
        return [blob for blob in wanted if not await _fetch_blob(channel, store, blob, progress)]


async def _fetch_blob(channel: Channel, store: LayerStore, blob: Blob, progress: Callable[[int], None] | None) -> bool:
    """Bring one file into the store, from where an earlier attempt left off; False if the peer does not have it."""
    with ExitStack() as stack:
        # In a thread, since it hashes what is there already.
        writer = await trio.to_thread.run_sync(stack.enter_context, store.writer(blob.digest, blob.size))
        resumed = writer.offset > 0
        await channel.send(GetBlob(digest=blob.digest, offset=writer.offset))
        while True:
            with trio.fail_after(_STALL_S):
                received = await channel.receive()
            if received is None:
                raise NetworkError(f"{channel.peer_id} closed the stream", code="stream_closed")
            message, body = received
            if isinstance(message, Refused):
                return False
            if not isinstance(message, BlobPart) or message.offset != writer.offset or message.size != blob.size:
                raise ProtocolError(f"{channel.peer_id} sent another part than asked for", code="bad_part")
            await trio.to_thread.run_sync(writer.write, memoryview(body))
            if progress is not None:
                progress(len(body))
            if writer.offset >= blob.size:
                break
            if not body:
                raise ProtocolError(f"{channel.peer_id} sent an empty part", code="bad_part")
        try:
            await trio.to_thread.run_sync(writer.commit)
        except TrustError:
            if not resumed:
                raise
        else:
            return True
    # The bad bytes may be those that another peer left here: once more, and all of it from this one.
    return await _fetch_blob(channel, store, blob, progress)


def _note_fault(overlay: Overlay, faults: list[str], peer_id: str, error: Exception) -> None:
    if isinstance(error, ProtocolError | TrustError):
        overlay.count_violation(peer_id)
    text = str(error) or f"nothing came for {_STALL_S:g} s"
    faults.append(f"{peer_id}: {text}")
    log(logger, logging.INFO, "cannot fetch from peer", peer=peer_id, reason=text)


def _nobody_has(what: str, faults: Sequence[str]) -> NetworkError:
    return NetworkError(
        f"no peer could send {what} ({'; '.join(faults) or 'none has it'})",
        code="no_provider",
        remedy="Check that the coordinator or another worker with these layers is online",
    )
