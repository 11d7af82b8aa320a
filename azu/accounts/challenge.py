"""Sign-in texts that only this coordinator can have asked for, without remembering one.

A nonce is 8 random bytes and a MAC of the text around them, in hex. So asking costs no memory and nobody can crowd out
another's challenge; what has to be remembered is which ones were redeemed, each until it expires (`store`).
Coordinators that share a database share the secret, and redeem each other's.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from azu.accounts.message import ChainName, SignInMessage
from azu.payments.wallets import Wallet, WalletKind
from azu.tickets import Refusal

__all__ = ["CHAIN_NAMES", "CHALLENGE_LIFE_S", "RANDOM_BYTES", "Site", "check_challenge", "make_challenge"]

CHALLENGE_LIFE_S = 600
RANDOM_BYTES = 8  # two texts of one second for one wallet differ by these
_RANDOM_CHARS = 2 * RANDOM_BYTES
_MAC_CHARS = 32  # 128 bits
_PURPOSE = b"azu sign-in challenge 1\n"
STATEMENT = "Make an API key of azu that can spend what this wallet has paid in. This sends no transaction."
CHAIN_NAMES: Final[Mapping[WalletKind, ChainName]] = {"evm": "Ethereum", "solana": "Solana"}


@dataclass(frozen=True, slots=True)
class Site:
    """Who asks: the domain and address that clients know this coordinator by.

    Args:
        chain_ids: its chain's id, for each kind of wallet that may sign in.
    """

    domain: str
    uri: str
    chain_ids: Mapping[WalletKind, str]


def make_challenge(secret: bytes, site: Site, wallet: Wallet, now: int, random: bytes) -> SignInMessage:
    """A text for the wallet to sign.

    Args:
        now: unix seconds.
        random: RANDOM_BYTES fresh ones.
    """
    bare = SignInMessage(
        domain=site.domain,
        chain=CHAIN_NAMES[wallet.kind],
        address=wallet.address,
        statement=STATEMENT,
        uri=site.uri,
        chain_id=site.chain_ids[wallet.kind],
        nonce=random.hex(),
        issued_at=now,
        expires_at=now + CHALLENGE_LIFE_S,
    )
    return replace(bare, nonce=bare.nonce + _mac(secret, bare))


def check_challenge(secret: bytes, site: Site, message: SignInMessage, now: int) -> Refusal | None:
    """What is wrong with a text that came back, if anything; its signature and whether it was redeemed come after."""
    if (message.domain, message.uri) != (site.domain, site.uri):
        return Refusal(
            "wrong_domain",
            f"the message signs in at {message.domain} ({message.uri}), and this is {site.domain} ({site.uri})",
            "Sign a message of this coordinator's own POST /auth/challenge.",
        )
    if message.chain_id not in [i for kind, i in site.chain_ids.items() if CHAIN_NAMES[kind] == message.chain]:
        expected = ", ".join(f"{CHAIN_NAMES[kind]} {chain_id}" for kind, chain_id in site.chain_ids.items())
        return Refusal(
            "wrong_chain",
            f"the message is for {message.chain} {message.chain_id}, and here it has to be {expected}",
            "Sign a message of this coordinator's own POST /auth/challenge.",
        )
    bare = replace(message, nonce=message.nonce[:_RANDOM_CHARS])
    if not hmac.compare_digest(message.nonce[_RANDOM_CHARS:].encode(), _mac(secret, bare).encode()):
        return Refusal(
            "unknown_challenge", "this coordinator never asked for that message", "Ask POST /auth/challenge for one."
        )
    if now >= message.expires_at:
        return Refusal(
            "expired_challenge",
            f"the message expired {now - message.expires_at} s ago",
            f"Ask POST /auth/challenge for another, and send it signed within {CHALLENGE_LIFE_S} s.",
        )
    return None


def _mac(secret: bytes, message: SignInMessage) -> str:
    return hmac.digest(secret, _PURPOSE + message.text().encode(), "sha256").hex()[:_MAC_CHARS]
