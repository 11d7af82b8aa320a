"""The messages of azu's protocols. docs/protocol.md tells their order; here are their fields and limits.

/azu/account/1   worker -> coordinator   what it is owed
/azu/control/1   anyone -> worker        what it is, and (from a coordinator) which range to load
/azu/layers/1    anyone -> any holder    a signed manifest, which files are there, or a range of one
/azu/job/1       coordinator -> stage    one job's ticket, prompt, tokens and end
/azu/ring/1      stage -> next stage     activations on, token ids from the last stage back to the first
/azu/pack/1      stage -> next stage     the same of decoded tokens, of all jobs at once; or tokens, to a coordinator
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from azu.crossings import NOTHING, Crossing
from azu.wire.codec import Codec, Message, encode_message
from azu.wire.document import PeerId, Tuple
from azu.wire.fields import MAX_PART, MAX_TOKENS, Code, Count, Epoch, JobId, Part, Text, TokenId
from azu.wire.layers import (
    MAX_ASKED,
    MAX_RANGE_BYTES,
    BlobRange,
    GetBlob,
    GetManifest,
    HaveBlobs,
    ManifestReply,
    WhichBlobs,
)
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
    "MAX_PACKED",
    "MAX_PACK_BYTES",
    "MAX_PART",
    "MAX_RANGE_BYTES",
    "MAX_TOKENS",
    "PACK",
    "PACK_PROTOCOL",
    "PING_S",
    "RING",
    "RING_PROTOCOL",
    "SILENCE_S",
    "Accepted",
    "Amend",
    "Assign",
    "Bequeath",
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
    "Inheritance",
    "Inherited",
    "Kept",
    "Leaving",
    "ManifestReply",
    "Message",
    "Moved",
    "Next",
    "Nexts",
    "Open",
    "Paused",
    "Ping",
    "Prompt",
    "Ready",
    "ReceiptReply",
    "Refused",
    "Resume",
    "Rows",
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
PACK_PROTOCOL = "/azu/pack/1"

# Both ends of a job stream say something at least this often, and take silence for death after SILENCE_S: a peer that
# was stopped or cut off ends no stream by itself.
PING_S = 2.0
SILENCE_S = 15.0
# The code with which a worker that is about to leave refuses jobs and layers: it is no fault.
LEAVING = "leaving"
# A stage keeps a job whose coordinator is away for so long at most: it restarts, and comes back to it.
KEEP_S = 120
# Jobs in a frame of a pack stream, and bytes of their hidden states.
MAX_PACKED, MAX_PACK_BYTES = 256, 262_144
_MAX_SIGNED_BYTES = 65_536


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


class Bequeath(Message):
    """Send the job's KV cache of the first `positions` to the peer that the ticket in the body names as your heir, and
    go on meanwhile.
    """

    max_body: ClassVar[int] = _MAX_SIGNED_BYTES
    t: Literal["bequeath"] = "bequeath"
    positions: Count


class Inherited(Message):
    """The stage has the KV cache of so many positions from who leaves it the stage; 0 where that came to nothing."""

    t: Literal["inherited"] = "inherited"
    positions: Count


class Paused(Message):
    """A stage computes nothing until it is told to resume in this epoch.

    It has `position` positions in its cache. Where `can_replay` is set, it can send on what it made of all of them from
    `replay_from` on.
    `received` and `sent` are as in a receipt for the epoch that ends here, up to the tokens that the coordinator had.
    Body: the sampled tokens that it knows beyond those that the coordinator has, as Prompt's.
    """

    max_body: ClassVar[int] = 4 * MAX_TOKENS
    t: Literal["paused"] = "paused"
    epoch: Epoch
    position: Count
    can_replay: bool
    replay_from: Count = 0
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


class Inheritance(Message):
    """After a hello from the stage's own former worker: the KV cache of so many positions follows."""

    t: Literal["inheritance"] = "inheritance"
    positions: Count


class Kept(Message):
    """Body: what a layer (of the stage, from 0) keeps of positions `position` .. `position + rows - 1`: the keys
    [heads, rows, width], and then the values, in the activations' dtype.
    """

    max_body: ClassVar[int] = 8_388_608
    t: Literal["kept"] = "kept"
    layer: Annotated[int, Field(ge=0, le=1_000)]
    position: Count
    rows: Count


class Next(Message):
    """From the last stage to the first: the `index`-th sampled token, which starts the next step."""

    t: Literal["next"] = "next"
    index: Count
    token: TokenId


class Credit(Message):
    """The receiver has room for `frames` more chunks."""

    t: Literal["credit"] = "credit"
    frames: Annotated[int, Field(ge=1, le=1_024)]


class Rows(Message):
    """Body: hidden states [jobs, hidden], of one decoded position of each; `jobs`: id, epoch and position of each."""

    max_body: ClassVar[int] = MAX_PACK_BYTES
    t: Literal["rows"] = "rows"
    jobs: Annotated[
        Tuple[Annotated[tuple[JobId, Epoch, Count], Field(strict=False)]],
        Field(min_length=1, max_length=MAX_PACKED),
    ]
    tensor: TensorHeader


class Nexts(Message):
    """`Next` of each of several jobs; `jobs`: id, epoch, index and token of each."""

    t: Literal["nexts"] = "nexts"
    jobs: Annotated[
        Tuple[Annotated[tuple[JobId, Epoch, Count, TokenId], Field(strict=False)]],
        Field(min_length=1, max_length=MAX_PACKED),
    ]


ACCOUNT = Codec("account", GetStatus, Status, Refused)
CONTROL = Codec("control", GetStatus, Status, Assign, Accepted, Refused)
LAYERS = Codec("layers", GetManifest, ManifestReply, WhichBlobs, HaveBlobs, GetBlob, BlobRange, Refused)
JOB = Codec(
    "job",
    *(Open, Prompt, Ping, Amend, Bequeath, Resume, End, Forget),
    *(Ready, Paused, Waiting, Leaving, Inherited, Token, Failed, ReceiptReply, Refused),
)
PACK = Codec("pack", Rows, Nexts)
RING = Codec("ring", Hello, Welcome, Chunk, Next, Credit, Moved, Inheritance, Kept, Refused)
