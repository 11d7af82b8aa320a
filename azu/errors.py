"""The one error tree of azu.

    AzuError
    ├── InputError       what the user, the application or the operator gave us is wrong (their fault)
    ├── TrustError       a signature, digest, expiry, epoch or permission does not hold (the remote's fault)
    ├── ProtocolError    a peer sent bytes that break one of azu's protocols (the remote's fault)
    ├── NetworkError     a peer cannot be reached, went away, or missed a deadline (nobody's fault)
    ├── ModelError       a model, manifest, layer file or tokenizer is unusable (the publisher's fault)
    ├── CapacityError    not enough memory, workers or coverage right now (nobody's fault; try later)
    └── InternalError    a bug of ours, or a local fault such as a full disk (our fault)

Every error has a stable `code` (snake_case; it appears in API answers, wire messages and logs), a message that says
what happened, and a remedy that says what the reader can do about it. Foreign exceptions are mapped to one of these in
the file that imports the foreign library.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AzuError",
    "CapacityError",
    "InputError",
    "InternalError",
    "ModelError",
    "NetworkError",
    "ProtocolError",
    "TrustError",
]


class AzuError(Exception):
    """Base of all azu errors; never raised itself.

    Args:
        message: what happened, as one sentence without a trailing period.
        code: a stable snake_case identifier; the class's default where omitted.
        remedy: what the reader can do about it; may be empty where nothing can be done.
    """

    default_code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, code: str | None = None, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class InputError(AzuError):
    """Bad input from a user, an application or an operator."""

    default_code = "bad_input"


class TrustError(AzuError):
    """A signature, digest, expiry, epoch or permission does not hold."""

    default_code = "untrusted"


class ProtocolError(AzuError):
    """A peer broke one of azu's protocols; its stream is reset and the peer counted."""

    default_code = "protocol_violation"


class NetworkError(AzuError):
    """A peer cannot be reached, went away, or missed a deadline."""

    default_code = "unreachable"


class ModelError(AzuError):
    """A model, manifest, layer file or tokenizer is unusable."""

    default_code = "bad_model"


class CapacityError(AzuError):
    """Not enough memory, workers or coverage right now.

    Args:
        retry_after_s: when to try again, in seconds; None where nothing is known.
    """

    default_code = "no_capacity"

    def __init__(
        self, message: str, *, code: str | None = None, remedy: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.retry_after_s = retry_after_s


class InternalError(AzuError):
    """A bug of ours or a local fault such as a full disk."""

    default_code = "internal"
