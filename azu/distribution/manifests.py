"""Fetching a manifest: small, signed, and from whoever answers first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from azu.channel import Channel
from azu.dialing import open_worker_stream
from azu.distribution.library import open_manifest
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.identity import MAX_ENVELOPE_BYTES
from azu.logs import log
from azu.models.manifest import Manifest
from azu.overlay import Overlay
from azu.wire.messages import LAYERS, LAYERS_PROTOCOL, GetManifest, ManifestReply

__all__ = ["fetch_manifest"]

logger = logging.getLogger(__name__)

_ANSWER_S = 30.0


async def fetch_manifest(
    overlay: Overlay, peers: Sequence[str], digest: str, *, is_trusted: Callable[[str], bool]
) -> tuple[bytes, Manifest]:
    """A manifest, and its envelope, from the first of `peers` that has it signed by a publisher whom we trust.

    Anybody can sign the same manifest anew, so a stranger's signature only means to ask on.

    Raises:
        NetworkError: none of them has it.
    """
    faults: list[str] = []
    for peer_id in peers:
        try:
            with trio.fail_after(_ANSWER_S):
                async with await open_worker_stream(overlay, peer_id, LAYERS_PROTOCOL) as stream:
                    channel = Channel(stream, LAYERS, max_body=MAX_ENVELOPE_BYTES)
                    await channel.send(GetManifest(digest=digest))
                    _, body = await channel.expect(ManifestReply)
            publisher, manifest = open_manifest(bytes(body), digest)
            if is_trusted(publisher):
                return bytes(body), manifest
            faults.append(f"{peer_id}: it is signed by {publisher}, whom we do not trust")
        except (AzuError, trio.TooSlowError) as error:
            if isinstance(error, ProtocolError | TrustError):
                overlay.count_violation(peer_id)
            text = str(error) or f"no answer within {_ANSWER_S:g} s"
            faults.append(f"{peer_id}: {text}")
            log(logger, logging.INFO, "cannot fetch from peer", peer=peer_id, reason=text)
    raise NetworkError(
        f"no peer could send manifest {digest[:12]} ({'; '.join(faults) or 'none has it'})",
        code="no_provider",
        remedy="Check that the coordinator or another worker of this model is online",
    )
