"""The routes that deal with money and whose it is, put onto the application."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from quart import request
from quart_trio import QuartTrio

from azu.accounts.challenge import Site
from azu.accounts.kept import KeptRequests
from azu.accounts.store import KeyStore
from azu.errors import InputError
from azu.ledger import Ledger
from azu.payments.base import PaymentProvider
from azu.payments.wallets import WalletKind, parse_wallet
from azu.tickets import Refusal
from coordinator.api.accounts import Accounts
from coordinator.api.auth import AuthMode, Gate
from coordinator.api.completions import Completions
from coordinator.api.pricing import preview_object, pricing_object
from coordinator.api.sign_in import SignIn
from coordinator.api.submit import Submissions
from coordinator.api.till import Till
from coordinator.generation import GenerationService

__all__ = ["Money", "add_money_routes"]

# At a coordinator that is on no chain, wallets sign in as on Ethereum's and Solana's main networks (CAIP-2).
_MAIN_CHAINS: Final[Mapping[WalletKind, str]] = {"evm": "1", "solana": "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdp"}
_KINDS: Final[Mapping[str, WalletKind]] = {"eip155": "evm", "solana": "solana"}


@dataclass(frozen=True, slots=True)
class Money:
    """What the application has to know of money.

    Args:
        price: smallest units per token-layer.
        public_url: where clients find this coordinator; where it listens, if None.
        unsettled: ids of ended jobs that are settled later.
    """

    ledger: Ledger
    provider: PaymentProvider
    mode: AuthMode
    price: int
    public_url: str | None = None
    unsettled: Container[str] = ()

    def gate(self) -> Gate:
        """Who is let in."""
        return Gate(self.mode, KeyStore(self.ledger).find, _reader(self.provider))

    def till(self) -> Till:
        """What takes the money."""
        return Till(self.ledger, self.provider, self.price, self.unsettled)

    def site(self, url: str) -> Site:
        """Who clients sign in at, where the coordinator listens at `url`."""
        public = self.public_url or url
        return Site(domain=urlsplit(public).netloc, uri=public, chain_ids=_chain_ids(self.provider))


def add_money_routes(
    app: QuartTrio,
    money: Money,
    gate: Gate,
    completions: Completions,
    service: GenerationService,
    journal: KeptRequests,
    url: Callable[[], str],
) -> Submissions:
    """Add the routes; what is submitted runs while the returned `run` does.

    Args:
        url: where the application listens.
    """
    accounts = Accounts(money.ledger, money.provider)
    submissions = Submissions(completions, gate, money.ledger, journal)
    _add_key_routes(app, SignIn(KeyStore(money.ledger), lambda: money.site(url())), gate)
    _add_pricing_routes(app, money, completions, service)

    @app.post("/deposit")
    async def deposit() -> dict[str, Any]:
        return await accounts.deposit(request)

    @app.get("/balance")
    async def balance() -> dict[str, Any]:
        return await accounts.balance(await gate.admit(request, "account", request.args.get("user_pubkey")))

    @app.get("/usage")
    async def usage() -> dict[str, Any]:
        caller = await gate.admit(request, "account", request.args.get("user_pubkey"))
        return await accounts.usage(caller, request.args)

    @app.post("/submit")
    async def submit() -> tuple[dict[str, Any], int]:
        return await submissions.submit(request), HTTPStatus.ACCEPTED

    @app.get("/results/<job_id>")
    async def result(job_id: str) -> dict[str, Any]:
        caller = await gate.admit(request, "inference", request.args.get("user_pubkey"))
        return await submissions.result(caller, job_id)

    return submissions


def _add_key_routes(app: QuartTrio, sign_in: SignIn, gate: Gate) -> None:
    @app.post("/auth/challenge")
    async def challenge() -> dict[str, Any]:
        return await sign_in.challenge(request)

    @app.post("/auth/keys")
    async def make_key() -> tuple[dict[str, Any], int]:
        return await sign_in.make_key(request), HTTPStatus.CREATED

    @app.get("/auth/keys")
    async def list_keys() -> dict[str, Any]:
        return await sign_in.list_keys(await gate.admit(request, "keys"))

    @app.delete("/auth/keys/<key_id>")
    async def revoke_key(key_id: str) -> dict[str, Any]:
        return await sign_in.revoke(await gate.admit(request, "keys"), key_id)


def _add_pricing_routes(app: QuartTrio, money: Money, completions: Completions, service: GenerationService) -> None:
    till = money.till()

    @app.get("/v1/pricing")
    async def pricing() -> dict[str, Any]:
        return pricing_object(till, money.provider, service.models())

    @app.post("/v1/pricing")
    async def preview() -> dict[str, Any]:
        job, _ = await completions.asked_for(request)
        return preview_object(till, money.provider, job.requests)


def _chain_ids(provider: PaymentProvider) -> Mapping[WalletKind, str]:
    namespace, _, reference = provider.chain.partition(":")
    return {_KINDS[namespace]: reference} if namespace in _KINDS else _MAIN_CHAINS


def _reader(provider: PaymentProvider) -> Callable[[str], str | Refusal]:
    """A wallet's address in the provider's spelling; any chain's where there is none."""
    if provider.chain.partition(":")[0] in _KINDS:
        return provider.read_address

    def read(text: str) -> str | Refusal:
        try:
            return parse_wallet(text).address
        except InputError as error:
            return Refusal(error.code, error.message, error.remedy)

    return read
