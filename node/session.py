"""What one stage of a job may do next. Pure: it checks what the neighbours send against the ticket and keeps count.

    prompt ids ─► first ─► chunk ─► ... ─► chunk ─► last ─► token ─► (finish? end : next ─► first)

A stage runs positions 0, 1, 2, ... of its job without gap or repetition: first those of the prompt, in chunks, then one
for each sampled token but the last. The last stage samples after the prompt's last chunk and after every position
that follows.

When other peers have taken stages over, a session begins in the middle: where the tokens of the first `known` samples
are known, they count as the prompt does. Their positions come in chunks, and the first sample is after the last one.
"""

from __future__ import annotations

from collections.abc import Iterator

from azu.errors import ProtocolError
from azu.models.memory import chunk_rows
from azu.tickets import JobTicket
from azu.wire.messages import MAX_PACK_BYTES, Chunk, Resume, Token
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE
from azu.wire.tokens import unpack_tokens

__all__ = ["StageSession"]


class StageSession:
    """The state of stage `index` of a ticket's job.

    Args:
        hidden_size: width of the hidden states.
        vocab_size: token ids are below this.
        known: tokens that were sampled before.
        position: positions that this stage holds already.
        next_position: those that the next stage holds already.
    """

    def __init__(
        self,
        ticket: JobTicket,
        index: int,
        *,
        hidden_size: int,
        vocab_size: int,
        known: int = 0,
        position: int = 0,
        next_position: int = 0,
    ) -> None:
        self.ticket = ticket
        self.index = index
        self.is_first = index == 0
        self.is_last = index == len(ticket.stages) - 1
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.dtype = ACTIVATIONS[ticket.dtype]  # what hidden states travel in
        self.rows = chunk_rows(hidden_size, ticket.dtype)
        self.base = ticket.prompt_tokens + known  # positions whose tokens are known from the start
        self.position = position  # positions accepted so far
        self._begin = position
        # The last stage may sample without this one, if it is the first: what the others hold is enough.
        self._is_behind = next_position == self.base
        self._sampled = known  # tokens that were sampled, as far as this stage knows as the last
        self._received = known  # sampled tokens that this stage, as the first, was told

    @property
    def row_bytes(self) -> int:
        """Of one position's hidden states."""
        return self.hidden_size * ITEMSIZE[self.dtype]

    @property
    def max_body(self) -> int:
        """The largest body in bytes that the previous stage may send."""
        return 0 if self.is_first else self.rows * self.row_bytes

    @property
    def needs_prompt(self) -> bool:
        """Whether this stage must see the prompt's token ids: the first to run them, the last to penalise them."""
        return self.is_first or (self.is_last and self.ticket.sampling.repetition_penalty != 1.0)

    def accept_prompt(self, body: bytearray) -> tuple[int, ...]:
        """The prompt's token ids out of a message body.

        Raises:
            ProtocolError: they are not as many as the ticket says, or not of this vocabulary.
        """
        return self._token_ids(body, self.ticket.prompt_tokens, "bad_prompt")

    def id_chunks(self, known: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], bool]]:
        """First stage: what it has not run of prompt and known tokens, in chunks, each with whether the last stage has
        to sample after it.
        """
        start = self._begin
        while start < len(known):
            ids = known[start : start + self.rows]
            start += len(ids)
            self.position = max(self.position, start)  # a token may have been accepted before
            yield ids, start == len(known)

    def accept_chunk(self, chunk: Chunk, body_length: int) -> int:
        """Later stages: check a chunk from the previous stage and return its rows.

        Raises:
            ProtocolError: it is not what comes next in this job.
        """
        rows = chunk.tensor.check(body_length, dtype=self.dtype, width=self.hidden_size, max_rows=self.rows)
        self._advance(chunk.position, rows, chunk.sample)
        return rows

    def accept_row(self, position: int, dtype: str, size: int) -> None:
        """Later stages: check a decoded position's hidden states, of so many bytes, that came in a pack.

        Raises:
            ProtocolError: they are not what comes next in this job, or had to come on its ring stream.
        """
        if dtype != self.dtype or size != self.row_bytes:
            raise ProtocolError(f"{size} bytes of {dtype} came for one position", code="bad_tensor")
        self._check_packed(position)
        self._advance(position, 1, sample=True)

    def may_pack(self, position: int) -> bool:
        """Whether a position's hidden states, or the token that begins it, may travel in a pack: what comes before it
        has been through the whole ring then, and so cannot be overtaken. None of a model that is too wide for a frame.
        """
        return position > self.base and self.row_bytes <= MAX_PACK_BYTES

    def _check_packed(self, position: int) -> None:
        if not self.may_pack(position):
            raise ProtocolError(f"position {position} came in a pack", code="bad_position")

    def _advance(self, position: int, rows: int, sample: bool) -> None:
        if self.is_first:
            raise ProtocolError("the first stage takes no hidden states", code="unexpected_message")
        end = self.position + rows
        if position != self.position:
            raise ProtocolError(f"position {position} came, {self.position} is next", code="bad_position")
        if end > self.base and (self.position < self.base or rows != 1 or end > self.ticket.total_tokens - 1):
            raise ProtocolError("a chunk reaches past the ticket's tokens", code="bad_position")
        if sample != (end >= self.base):
            raise ProtocolError("a chunk asks to sample where the ticket does not", code="bad_position")
        self.position = end

    def accept_packed_next(self, index: int, token: int) -> int:
        """First stage: as `accept_next`, of a token that came in a pack."""
        self._check_packed(self.ticket.prompt_tokens + index)
        return self.accept_next(index, token)

    def accept_next(self, index: int, token: int) -> int:
        """First stage: check the `index`-th token, from the last stage, and return it.

        Raises:
            ProtocolError: it is not the token that comes next.
        """
        if not self.is_first:
            raise ProtocolError("only the first stage takes token ids", code="unexpected_message")
        position = self.ticket.prompt_tokens + self._received
        if index != self._received or (self.position != position and not self._is_behind):
            raise ProtocolError(f"token {index} came out of turn", code="bad_position")
        if position >= self.ticket.total_tokens - 1:
            raise ProtocolError("a token came past the ticket's max_tokens", code="bad_position")
        if token >= self.vocab_size:
            raise ProtocolError("a token id is outside the vocabulary", code="bad_token")
        self._received += 1
        self.position = position + 1
        return token

    def accept_resume(self, message: Resume, body: bytearray, held: int) -> tuple[int, ...]:
        """The known tokens with which a session is to begin, in the first and the last stage; none in the others.

        Args:
            held: positions in this stage's cache.

        Raises:
            ProtocolError: this stage cannot begin so.
        """
        base = self.ticket.prompt_tokens + message.known
        if message.position not in (0, held) or message.position > base or message.send_from > base:
            raise ProtocolError("a job is to go on where this stage cannot", code="bad_resume")
        if message.known >= self.ticket.max_tokens:
            raise ProtocolError("a job that has all its tokens does not go on", code="bad_resume")
        count = message.known if self.is_first or self.is_last else 0
        return self._token_ids(body, count, "bad_resume")

    def _token_ids(self, body: bytearray, count: int, code: str) -> tuple[int, ...]:
        if len(body) != 4 * count:
            raise ProtocolError(f"{len(body)} bytes of token ids came, not {4 * count}", code=code)
        tokens = unpack_tokens(body)
        if max(tokens, default=0) >= self.vocab_size:
            raise ProtocolError("a token id is outside the vocabulary", code=code)
        return tokens

    def sampled(self, token: int) -> Token:
        """Last stage: note a sampled token and return the message for the coordinator."""
        index = self._sampled
        self._sampled += 1
        if token in self.ticket.stop_tokens:
            return Token(index=index, token=token, finish="stop")
        return Token(index=index, token=token, finish="length" if self._sampled == self.ticket.max_tokens else "")
