"""The text that a wallet signs to show whose it is: EIP-4361 for Ethereum's chains, CAIP-122's form of it for Solana.

    https://eips.ethereum.org/EIPS/eip-4361
    https://namespaces.chainagnostic.org/solana/caip122

Only the one spelling that `SignInMessage.text` makes is read back: what a wallet shows its owner and what is checked
here cannot differ by a space, a field more or a number written otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from azu.errors import InputError

__all__ = ["MAX_MESSAGE_CHARS", "ChainName", "SignInMessage", "parse_message"]

ChainName = Literal["Ethereum", "Solana"]

MAX_MESSAGE_CHARS = 4096
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
_TEXT: Final = re.compile(
    r"(?P<domain>[!-~]{1,255}) wants you to sign in with your (?P<chain>Ethereum|Solana) account:\n"
    r"(?P<address>[0-9A-Za-z]{32,44})\n"
    r"\n"
    r"(?P<statement>[ -~]{1,300})\n"
    r"\n"
    r"URI: (?P<uri>[!-~]{1,1024})\n"
    r"Version: 1\n"
    r"Chain ID: (?P<chain_id>[0-9A-Za-z:_-]{1,64})\n"
    r"Nonce: (?P<nonce>[0-9A-Za-z]{8,128})\n"
    rf"Issued At: (?P<issued_at>{_STAMP})\n"
    rf"Expiration Time: (?P<expires_at>{_STAMP})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class SignInMessage:
    """What the text says; times are unix seconds.

    Args:
        domain: host, and port where it is not the usual one, of who asks; wallets warn where it is not the page's own.
        chain_id: an EIP-155 number for Ethereum, a CAIP-2 reference for Solana.
    """

    domain: str
    chain: ChainName
    address: str
    statement: str
    uri: str
    chain_id: str
    nonce: str
    issued_at: int
    expires_at: int

    def text(self) -> str:
        """The text to sign, in its one spelling."""
        return (
            f"{self.domain} wants you to sign in with your {self.chain} account:\n"
            f"{self.address}\n"
            "\n"
            f"{self.statement}\n"
            "\n"
            f"URI: {self.uri}\n"
            "Version: 1\n"
            f"Chain ID: {self.chain_id}\n"
            f"Nonce: {self.nonce}\n"
            f"Issued At: {_stamp(self.issued_at)}\n"
            f"Expiration Time: {_stamp(self.expires_at)}"
        )


def parse_message(text: str) -> SignInMessage:
    """Read a text back; what comes out makes the same text again.

    Raises:
        InputError: code "bad_message", where it is no such text.
    """
    found = _TEXT.fullmatch(text) if len(text) <= MAX_MESSAGE_CHARS else None
    if found is None:
        raise _unreadable()
    try:
        times = {name: _seconds(found[name]) for name in ("issued_at", "expires_at")}
    except ValueError as error:  # the 31st of February
        raise _unreadable() from error
    return SignInMessage(**found.groupdict() | times)  # type: ignore[arg-type]  # the pattern's names are the fields


def _unreadable() -> InputError:
    return InputError(
        "the message is no sign-in text of azu's",
        code="bad_message",
        remedy="Sign and send back the message of POST /auth/challenge as it is, to the last character.",
    )


def _stamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(_TIME)


def _seconds(stamp: str) -> int:
    return int(datetime.strptime(stamp, _TIME).replace(tzinfo=UTC).timestamp())
