"""The messages of azu's protocols. docs/protocol.md tells their order; here are their fields and limits.

/azu/account/1   worker -> coordinator   what it is owed
/azu/control/1   anyone -> worker        what it is, and (from a coordinator) which range to load
/azu/layers/1    anyone -> any holder    a signed manifest, which files are there, or a range of one
/azu/job/1       coordinator -> stage    one job's ticket, prompt, tokens and end
/azu/ring/1      stage -> next stage     activations on, token ids from the last stage back to the first
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from azu.crossings import NOTHING, Crossing
from azu.wire.codec import Codec, Message, encode_message
from azu.wire.document import Digest, PeerId
from azu.wire.tensors import TensorHeader

__all__ = [
    "ACCOUNT",
    "ACCOUNT_PROTOCOL",
    "CONTROL",
    "CONTROL_PROTOCOL",
    "JOB",
    "JOB_PROTOCOL",
    "KEEP_S",
    "LAYERS",
    "LAYERS_PROTOCOL",
    "LEAVING",
    "MAX_ASKED",
    "MAX_PART",
    "MAX_RANGE_BYTES",
    "MAX_TOKENS",
    "PING_S",
    "RING",
    "RING_PROTOCOL",
    "SILENCE_S",
    "Accepted",
    "Amend",
    "Assign",
    "BlobRange",
    "Chunk",
    "Codec",
    "Credit",
    "End",
    "Failed",
    "Forget",
    "GetBlob",
    "GetManifest",
    "GetStatus",
    "HaveBlobs",
    "Hello",
    "Leaving",
    "ManifestReply",
    "Message",
    "Moved",
    "Next",
    "Open",
    "Paused",
    "Ping",
    "Prompt",
    "Ready",
    "ReceiptReply",
    "Refused",
    "Resume",
    "Status",
    "Token",
    "Waiting",
    "Welcome",
    "WhichBlobs",
    "encode_message",
]

ACCOUNT_PROTOCOL = "/azu/account/1"
CONTROL_PROTOCOL = "/azu/control/1"
LAYERS_PROTOCOL = "/azu/layers/1"
JOB_PROTOCOL = "/azu/job/1"
RING_PROTOCOL = "/azu/ring/1"

# The longest context of any published model is 10M tokens (Llama 4 Scout); ids of 1M are 4 MiB, enough for one job.
MAX_TOKENS = 1_048_576
# What is asked for at once of a file: a piece that can be verified on its own (azu.models.manifest.PIECE_BYTES).
MAX_RANGE_BYTES = 4_194_304
# Files that are asked for in one question: more than a stage of any model has.
MAX_ASKED = 8_192
# Streams beyond the first that a stage may offer the next one in a job. One is enough to leave a relay, but a direct
# connection that breaks at once may take some tries.
MAX_PART = 8
# Both ends of a job stream say something at least this often, and take silence for death after SILENCE_S: a peer that
# was stopped or cut off ends no stream by itself.
PING_S = 2.0
SILENCE_S = 15.0
# The code with which a worker that is about to leave refuses jobs and layers: it is no fault.
LEAVING = "leaving"
# A stage keeps a job whose coordinator is away for so long at most: it restarts, and comes back to it.
KEEP_S = 120
_MAX_SIGNED_BYTES = 65_536
_MAX_FILE_BYTES = 2**44

Count = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Part = Annotated[int, Field(ge=0, le=MAX_PART)]
Epoch = Annotated[int, Field(ge=0, le=2**31)]
JobId = Annotated[bytes, Field(min_length=16, max_length=16)]
Text = Annotated[str, Field(max_length=2_000)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]


class Refused(Message):
    """No, and why; the stream ends after it."""

    t: Literal["refused"] = "refused"
    code: Code
    message: Text
    remedy: Text = ""


class GetStatus(Message):
    """Ask a worker for its newest record, or a coordinator for the asker's account."""

    t: Literal["get-status"] = "get-status"


class Status(Message):
    """Body: the worker's signed record, or the asker's account signed by the coordinator."""

    max_body: ClassVar[int] = _MAX_SIGNED_BYTES
    t: Literal["status"] = "status"


class Assign(Message):
    """Body: an assignment signed by a coordinator."""

    max_body: ClassVar[int] = _MAX_SIGNED_BYTES
    t: Literal["assign"] = "assign"


class Accepted(Message):
    """The assignment is taken (or was already fulfilled)."""

    t: Literal["accepted"] = "accepted"


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


class Open(Message):
    """Body: the signed job ticket. `keep_s`: how long the job is to be kept while its coordinator is away."""

    max_body: ClassVar[int] = _MAX_SIGNED_BYTES
    t: Literal["open"] = "open"
    keep_s: Annotated[int, Field(ge=0, le=KEEP_S)] = 0


class Ready(Message):
    """The ticket holds, memory is reserved, and the next stage was reached."""

    t: Literal["ready"] = "ready"


class Prompt(Message):
    """Body: the prompt's token ids (`azu.wire.tokens`)."""

    max_body: ClassVar[int] = 4 * MAX_TOKENS
    t: Literal["prompt"] = "prompt"


class Waiting(Message):
    """The job waits for KV cache that older ones have; said again every few seconds."""

    t: Literal["waiting"] = "waiting"


class Token(Message):
    """The `index`-th sampled token (from 0); `finish` is set on the last one."""

    t: Literal["token"] = "token"
    index: Count
    token: TokenId
    finish: Literal["", "stop", "length"] = ""


class Amend(Message):
    """Other peers run some of the job's stages. Body: the ticket with a higher epoch, signed anew.

    `known` is how many sampled tokens the coordinator has. First on a job stream: it comes back to a job that is kept.
    """

    max_body: ClassVar[int] = _MAX_SIGNED_BYTES
    t: Literal["amend"] = "amend"
    known: Count


class Leaving(Message):
    """The stage's worker is about to leave the swarm: others are to take its jobs over. It goes on until they have."""

    t: Literal["leaving"] = "leaving"


class Paused(Message):
    """A stage computes nothing until it is told to resume in this epoch.

    It has `position` positions in its cache, and can send on what it made of all of them where `can_replay` is set.
    `received` and `sent` are as in a receipt for the epoch that ends here, up to the tokens that the coordinator had.
    Body: the sampled tokens that it knows beyond those that the coordinator has, as Prompt's.
    """

    max_body: ClassVar[int] = 4 * MAX_TOKENS
    t: Literal["paused"] = "paused"
    epoch: Epoch
    position: Count
    can_replay: bool
    received: Crossing = NOTHING
    sent: Crossing = NOTHING


class Resume(Message):
    """Go on from position `position` (0: afresh), and send what comes of position `send_from` and later ones.

    `known` tokens have been sampled. Body: these, for the first and the last stage, as Prompt's; else empty.
    """

    max_body: ClassVar[int] = 4 * MAX_TOKENS
    t: Literal["resume"] = "resume"
    epoch: Epoch
    position: Count
    send_from: Count
    known: Count


class Ping(Message):
    """A sign of life, sent by both ends of a job stream."""

    t: Literal["ping"] = "ping"


class End(Message):
    """The coordinator is done with the job (finished or cancelled): free it and answer with the receipt.

    `tokens` came out of it; the receipt says what the neighbours gave each other for as many.
    """

    t: Literal["end"] = "end"
    tokens: Count = 0


class Forget(Message):
    """The job goes on without this stage: free it."""

    t: Literal["forget"] = "forget"


class Failed(Message):
    """A stage cannot go on; `peer_id` is the peer whose fault it seems."""

    t: Literal["failed"] = "failed"
    code: Code
    message: Text
    peer_id: PeerId


class ReceiptReply(Message):
    """Body: the stage's signed receipt."""

    max_body: ClassVar[int] = _MAX_SIGNED_BYTES
    t: Literal["receipt"] = "receipt"


class Hello(Message):
    """First on a ring stream: which job, and which of its stages is speaking.

    `part` is 0 on the first stream, and grows with each that is to take over from the one in use.
    """

    t: Literal["hello"] = "hello"
    job_id: JobId
    epoch: Epoch
    stage: Annotated[int, Field(ge=0, le=1_000)]
    part: Part = 0


class Welcome(Message):
    """Answer to a hello whose part is not 0: the ring may move to this stream."""

    t: Literal["welcome"] = "welcome"


class Moved(Message):
    """Last on a ring stream, first from the sender, then back from the receiver: the ring goes on in stream `part`."""

    t: Literal["moved"] = "moved"
    part: Part


class Chunk(Message):
    """Body: hidden states [n, hidden] of positions `position` .. `position + n - 1`.

    `sample` is set where the last stage has to sample after the chunk's last position.
    """

    # The job's stage lowers this to what its model and ticket allow.
    max_body: ClassVar[int] = 67_108_864
    t: Literal["chunk"] = "chunk"
    position: Count
    tensor: TensorHeader
    sample: bool


class Next(Message):
    """From the last stage to the first: the `index`-th sampled token, which starts the next step."""

    t: Literal["next"] = "next"
    index: Count
    token: TokenId


class Credit(Message):
    """The receiver has room for `frames` more chunks."""

    t: Literal["credit"] = "credit"
    frames: Annotated[int, Field(ge=1, le=1_024)]


ACCOUNT = Codec("account", GetStatus, Status, Refused)
CONTROL = Codec("control", GetStatus, Status, Assign, Accepted, Refused)
LAYERS = Codec("layers", GetManifest, ManifestReply, WhichBlobs, HaveBlobs, GetBlob, BlobRange, Refused)
JOB = Codec(
    "job",
    *(Open, Prompt, Ping, Amend, Resume, End, Forget),
    *(Ready, Paused, Waiting, Leaving, Token, Failed, ReceiptReply, Refused),
)
RING = Codec("ring", Hello, Welcome, Chunk, Next, Credit, Moved, Refused)
