"""Who may ask a coordinator, where they find it, and what it costs them."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, Field
from pydantic_settings import BaseSettings

from azu.economics import MAX_PRICE
from azu.errors import InputError
from azu.setting_types import Text, checked, cli

__all__ = ["AccountSettings", "check_public_url"]

_MAX_DOMAIN = 255


def check_public_url(text: str) -> str:
    """An http or https URL without a path, as wallets are shown it when they sign in.

    Raises:
        InputError: code "bad_url".
    """
    url = text.removesuffix("/")
    try:
        parts = urlsplit(url)
        is_plain = url.isascii() and url.isprintable() and " " not in url and parts.port != 0 and bool(parts.hostname)
    except ValueError:
        is_plain, parts = False, urlsplit("")
    if not is_plain or url != f"{parts.scheme}://{parts.netloc}" or "@" in parts.netloc:
        raise _bad_url(text)
    if parts.scheme not in ("http", "https") or len(parts.netloc) > _MAX_DOMAIN:
        raise _bad_url(text)
    return url


def _bad_url(text: str) -> InputError:
    remedy = "Write it like https://azu.example.org, without a path."
    return InputError(f"{text[:200]!r} is no public URL", code="bad_url", remedy=remedy)


PublicUrl = Annotated[Text, AfterValidator(checked(check_public_url))]


class AccountSettings(BaseSettings):
    """A coordinator's accounts."""

    auth_mode: Literal["keys", "open"] | None = Field(
        default=None,
        validation_alias=AliasChoices("AZU_AUTH_MODE", "auth_mode"),
        description="keys: requests need an API key, which a wallet signs for. open: a wallet's address will do, on "
        "loopback only. Where omitted, keys if there is a payment provider; else nobody is asked.",
    )
    public_url: PublicUrl | None = Field(
        default=None,
        description="Where clients find this coordinator, such as https://azu.example.org: wallets show it when they "
        "sign in. http://HOST:PORT where omitted, which does for loopback only.",
        json_schema_extra=cli(metavar="URL"),
    )
    price_per_token_layer: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PRICE,
        description="What one token through one layer costs, in the coin's smallest unit: 2 lamports on Solana and "
        "2000000000 wei on HyperEVM where omitted.",
        json_schema_extra=cli(metavar="UNITS"),
    )
