"""Who asks, and what they may: by API key, by wallet address on loopback, or anybody where use is free.

keys   the header Authorization: Bearer azu-... names a key, and the key a wallet
open   the bearer token is the wallet's address, taken at its word: only on loopback, for trying things out
free   nobody pays, so nobody is asked
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from quart import Request

from azu.accounts.keys import ApiKey, Scope, check_key, key_id_of
from azu.errors import InputError
from azu.tickets import Refusal
from coordinator.api.errors import ApiError

__all__ = ["AuthMode", "Caller", "Gate", "address_of", "auth_mode", "unauthorized"]

AuthMode = Literal["keys", "open", "free"]

_MAX_TOKEN_CHARS = 512  # of the header; no key and no address is as long
_MAKE = "Send the header Authorization: Bearer azu-...; a key is made with POST /auth/challenge and POST /auth/keys."
_LOOPBACK_NAMES = ("localhost", "localhost.")
# What proxies add: behind one, a client on loopback is anybody.
_PROXY_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-Ip", "Via")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is.

    Args:
        wallet: who pays; "" where use is free.
        key_id: the key's, where there is one.
        turn: whose turn it is when requests wait: the wallet, or the client's address.
    """

    wallet: str
    key_id: str | None
    turn: str


class Gate:
    """Lets requests in; one for the app. By default use is free.

    Args:
        find_key: what is kept under a key's id.
        read_wallet: a wallet's address in its one spelling.
    """

    def __init__(
        self,
        mode: AuthMode = "free",
        find_key: Callable[[str], Awaitable[ApiKey | None]] | None = None,
        read_wallet: Callable[[str], str | Refusal] = str,
    ) -> None:
        self._mode = mode
        self._find_key = find_key
        self._read_wallet = read_wallet

    async def admit(self, request: Request, scope: Scope | None, claimed: str | None = None) -> Caller:
        """Who asks.

        Args:
            scope: what a key has to be good for; None where any key will do.
            claimed: the wallet that the request names besides; it has to be the caller's.

        Raises:
            ApiError: status 401 where it is not known who asks, 403 where they may not.
        """
        return self.claim(await self.identify(request, scope), claimed)

    async def identify(self, request: Request, scope: Scope | None) -> Caller | None:
        """Who asks, by the request's header alone; None where only its body can tell. Raises as `admit` does."""
        if self._mode == "free":
            return Caller("", None, address_of(request.remote_addr))
        token = _bearer(request)
        if self._mode == "open":
            _check_loopback(request)
            return self._of_wallet(token) if token else None
        if not token:
            raise unauthorized("This needs an API key", "missing_api_key", _MAKE)
        return await self._of_key(token, scope)

    def claim(self, caller: Caller | None, claimed: str | None) -> Caller:
        """The caller, now that it is known which wallet the request names. Raises as `admit` does."""
        if caller is None:
            if not claimed:
                remedy = "Use your wallet's address as the API key, or send it as user_pubkey (AUTH_MODE=open)."
                raise unauthorized("This needs a wallet", "missing_api_key", remedy)
            return self._of_wallet(claimed)
        if claimed and caller.wallet and self._read_wallet(claimed) != caller.wallet:
            raise unauthorized(
                f"user_pubkey is another wallet than that of the API key, {caller.wallet}",
                "wrong_wallet",
                "Leave user_pubkey out, or use a key of that wallet.",
                status=HTTPStatus.FORBIDDEN,
            )
        return caller

    async def _of_key(self, token: str, scope: Scope | None) -> Caller:
        key_id = key_id_of(token)
        kept = await self._find_key(key_id) if key_id and self._find_key else None
        key = check_key(token, kept, scope, int(time.time()))
        if isinstance(key, Refusal):
            status = HTTPStatus.FORBIDDEN if key.code == "missing_scope" else HTTPStatus.UNAUTHORIZED
            raise unauthorized(key.message, key.code, key.remedy, status=status)
        return Caller(key.wallet, key.key_id, key.wallet)

    def _of_wallet(self, text: str) -> Caller:
        wallet = self._read_wallet(text)
        if isinstance(wallet, Refusal):
            remedy = "This coordinator runs with AUTH_MODE=open: use your wallet's address as the API key."
            raise unauthorized(wallet.message, "invalid_api_key", remedy)
        return Caller(wallet, None, wallet)


def auth_mode(asked: Literal["keys", "open"] | None, provider: str, host: str, public_url: str | None) -> AuthMode:
    """The mode of a coordinator with that payment provider, listening on that host.

    Raises:
        InputError: code "open_mode_exposed": open on an address that others reach. Code "public_url_missing": wallets
            would sign in at an address that is not the coordinator's.
    """
    if asked == "open" and not _is_loopback(host):
        raise InputError(
            f"AUTH_MODE=open would let everybody who reaches {host} spend anybody's balance",
            code="open_mode_exposed",
            remedy="Listen on 127.0.0.1, or use AUTH_MODE=keys.",
        )
    mode: AuthMode = asked or "keys"
    if provider == "none" and asked != "keys":  # there is nobody's balance to be spent
        mode = "free"
    if mode == "keys" and public_url is None and not _is_loopback(host):
        raise InputError(
            f"wallets sign in at a name, and {host} is none that clients know",
            code="public_url_missing",
            remedy="Give --public-url, such as https://azu.example.org, as clients reach this coordinator.",
        )
    return mode


def address_of(address: str | None) -> str:
    """A client's address, of IPv6 the /64, which is one home's."""
    with suppress(ValueError):
        client = ipaddress.ip_address((address or "").split("%")[0])
        return str(client if client.version == 4 else ipaddress.ip_network((client, 64), strict=False))
    return ""


def unauthorized(message: str, code: str, remedy: str, *, status: int = HTTPStatus.UNAUTHORIZED) -> ApiError:
    """The refusal of a request whose sender is not known, or may not."""
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {}
    return ApiError(message, status=status, code=code, remedy=remedy, headers=headers)


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip()[:_MAX_TOKEN_CHARS] if scheme.lower() == "bearer" else ""


def _check_loopback(request: Request) -> None:
    """Open mode is for this machine: not for others, nor for a page that a browser here shows (DNS rebinding)."""
    host = request.host.rsplit(":", 1)[0] if not request.host.endswith("]") else request.host
    proxied = any(name in request.headers for name in _PROXY_HEADERS)
    if proxied or not _is_loopback(request.remote_addr or "") or not _is_loopback(host.strip("[]")):
        raise unauthorized(
            "This coordinator answers programs on its own machine only (AUTH_MODE=open)",
            "loopback_only",
            "Ask it at http://127.0.0.1 directly, or have its operator use AUTH_MODE=keys.",
            status=HTTPStatus.FORBIDDEN,
        )


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() in _LOOPBACK_NAMES
