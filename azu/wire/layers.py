"""The messages of /azu/layers/1, but for a refusal."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from azu.wire.codec import Message
from azu.wire.document import Digest

__all__ = [
    "MAX_ASKED",
    "MAX_RANGE_BYTES",
    "BlobRange",
    "GetBlob",
    "GetManifest",
    "HaveBlobs",
    "ManifestReply",
    "WhichBlobs",
]

# What is asked for at once of a file: a piece that can be verified on its own (azu.models.manifest.PIECE_BYTES).
MAX_RANGE_BYTES = 4_194_304
# Files that are asked for in one question: more than a stage of any model has.
MAX_ASKED = 8_192
_MAX_FILE_BYTES = 2**44


class GetManifest(Message):
    """Ask for the signed manifest with this digest."""

    t: Literal["get-manifest"] = "get-manifest"
    digest: Digest


class ManifestReply(Message):
    """Body: the manifest in its publisher's envelope."""

    max_body: ClassVar[int] = 1_200_000
    t: Literal["manifest"] = "manifest"


class WhichBlobs(Message):
    """Ask which of some files a peer has. Body: their SHA-256s, 32 bytes each."""

    max_body: ClassVar[int] = 32 * MAX_ASKED
    t: Literal["which-blobs"] = "which-blobs"


class HaveBlobs(Message):
    """Body: a byte for each file asked for, in order: 0 where it is not here, else 1 + how often it was asked of this
    peer before (254 for more often), so that askers can spread themselves."""

    max_body: ClassVar[int] = MAX_ASKED
    t: Literal["have-blobs"] = "have-blobs"


class GetBlob(Message):
    """Ask for `length` bytes of a file from `offset`."""

    t: Literal["get-blob"] = "get-blob"
    digest: Digest
    offset: Annotated[int, Field(ge=0, le=_MAX_FILE_BYTES)]
    length: Annotated[int, Field(ge=0, le=MAX_RANGE_BYTES)]


class BlobRange(Message):
    """Body: exactly the bytes that were asked for."""

    max_body: ClassVar[int] = MAX_RANGE_BYTES
    t: Literal["blob-range"] = "blob-range"
