"""What all messages are: a frame's header, and the body that comes with it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from azu.errors import ProtocolError
from azu.wire.document import Document, decode_cbor, encode_cbor, reason
from azu.wire.frames import MAX_HEADER_BYTES, Buffer, Frame, encode_frame

__all__ = ["Codec", "Message", "encode_message"]


class Message(Document):
    """A frame's header. `max_body` is the largest body in bytes that may come with it."""

    max_body: ClassVar[int] = 0


class Codec:
    """Decodes the messages of one protocol and refuses all others."""

    def __init__(self, name: str, *messages: type[Message]) -> None:
        self.name = name
        self.max_body = max(message.max_body for message in messages)
        union: Any = messages[0]
        for message in messages[1:]:
            union = union | message
        self._adapter: TypeAdapter[Message] = TypeAdapter(Annotated[union, Field(discriminator="t")])

    def decode(self, frame: Frame) -> Message:
        """The message in a frame's header.

        Raises:
            ProtocolError: it is not one of this protocol's messages, or its body is larger than the message allows.
        """
        values = decode_cbor(frame.header, limit=MAX_HEADER_BYTES)
        try:
            message = self._adapter.validate_python(values)
        except ValidationError as error:
            raise ProtocolError(f"not a {self.name} message: {reason(error)}", code="bad_message") from error
        if len(frame.body) > message.max_body:
            raise ProtocolError(f"a body of {len(frame.body)} bytes with a {type(message).__name__}", code="too_large")
        return message


def encode_message(message: Message, body: Buffer = b"") -> tuple[Buffer, ...]:
    """The buffers to write for one message and its body."""
    return encode_frame(encode_cbor(message.model_dump()), body)
