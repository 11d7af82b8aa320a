"""The types of settings: what a value may be, on the command line, in a variable or in a .env file."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from azu.errors import InputError
from azu.operator_input import check_device, check_host_port, check_multiaddr, check_peer_address, check_peer_id
from azu.sizes import parse_size
from azu.swarm_key import check_swarm_key

T = TypeVar("T")
R = TypeVar("R")


def checked(check: Callable[[T], R]) -> Callable[[T], R]:
    """The check as pydantic wants it: our InputError becomes a validation error that carries the remedy along."""

    @wraps(check)
    def validate(value: T) -> R:
        try:
            return check(value)
        except InputError as error:
            raise PydanticCustomError("azu", "{message}", {"message": error.message, "remedy": error.remedy}) from error

    return validate


def _check_payout_address(text: str) -> str:
    from azu.payments.addresses import check_payout_address  # which other programs need not load

    return check_payout_address(text)


def words(value: object) -> object:
    """A variable's text as a list; what the command line gives is one already."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def cli(*, metavar: str | None = None, option: str | None = None) -> dict[str, Any]:
    """What azu.cli shows for this field, where its type and name do not say it well enough."""
    return {"metavar": metavar, "option": option}


JobIdText = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Words = Annotated[tuple[Text, ...], NoDecode, BeforeValidator(words)]
Multiaddr = Annotated[str, AfterValidator(checked(check_multiaddr))]
PeerAddress = Annotated[str, AfterValidator(checked(check_peer_address))]
PeerId = Annotated[str, AfterValidator(checked(check_peer_id))]
Multiaddrs = Annotated[tuple[Multiaddr, ...], NoDecode, BeforeValidator(words)]
PeerAddresses = Annotated[tuple[PeerAddress, ...], NoDecode, BeforeValidator(words)]
PeerIds = Annotated[tuple[PeerId, ...], NoDecode, BeforeValidator(words)]
PayoutAddress = Annotated[str, AfterValidator(checked(_check_payout_address))]
Size = Annotated[int, BeforeValidator(checked(parse_size))]
Device = Annotated[str, AfterValidator(checked(check_device))]
Folder = Annotated[Path, AfterValidator(lambda path: path.expanduser())]
SwarmKeyFile = Annotated[Folder, AfterValidator(checked(check_swarm_key))]
HostPort = Annotated[str, AfterValidator(checked(check_host_port))]
Port = Annotated[int, Field(ge=0, le=65535)]
