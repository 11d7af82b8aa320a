"""Wallets with real keys, and a coordinator's HTTP side with a real ledger that they pay into."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio
from solders.keypair import Keypair
from sqlalchemy import func, select

from azu.accounts.store import key_limits
from azu.identity import Identity
from azu.ledger import Ledger, schema
from azu.payments import PaymentProvider, open_provider
from azu.payments.settings import PaymentSettings
from coordinator.api import ApiSettings, Money, create_app, serve_http
from coordinator.api.auth import AuthMode
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.twin import LAYERS, Twin
from tests.payments.anvil import account

PRICE = 2_000_000_000
PLATFORM = "0x00000000000000000000000000000000000000AA"


class EvmWallet:
    """A wallet of HyperEVM."""

    def __init__(self, number: int) -> None:
        self.account = account(number)
        self.address: str = self.account.address

    def sign(self, text: str) -> str:
        from eth_account.messages import encode_defunct  # behind its loader

        return "0x" + bytes(self.account.sign_message(encode_defunct(text=text)).signature).hex()


class SolanaWallet:
    """A wallet of Solana."""

    def __init__(self, number: int) -> None:
        self.pair = Keypair.from_seed(bytes([number]) * 32)
        self.address = str(self.pair.pubkey())

    def sign(self, text: str) -> str:
        return str(self.pair.sign_message(text.encode()))


ALICE, BOB = EvmWallet(1), EvmWallet(2)


def provider(name: str, settings: dict[str, Any] | None = None) -> AbstractAsyncContextManager[PaymentProvider]:
    """A real one, whose RPC is nobody unless set: it is asked for deposits and payouts alone."""
    usual: dict[str, Any] = {
        "hyperliquid": {"hyperliquid_rpc_url": ("http://127.0.0.1:9",), "hyperliquid_address": PLATFORM},
        "solana": {"solana_rpc_url": ("http://127.0.0.1:9",), "solana_address": SolanaWallet(99).address},
        "none": {},
    }[name]
    return open_provider(PaymentSettings(payment_provider=name, **{**usual, **(settings or {})}))


class Bank:
    """The coordinator with its ledger, and what a test asks of both."""

    def __init__(self, web: httpx.Client, ledger: Ledger, twin: Twin, money: Money) -> None:
        self.url = str(web.base_url).removesuffix("/")
        self._web = web
        self.ledger = ledger
        self.twin = twin
        self.money = money

    async def send(self, method: str, path: str, *, key: str = "", **options: Any) -> httpx.Response:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        return await in_thread(partial(self._web.request, method, path, headers=headers, **options))

    async def challenge(self, wallet: EvmWallet | SolanaWallet = ALICE) -> str:
        response = await self.send("POST", "/auth/challenge", json={"address": wallet.address})
        assert response.status_code == 200, response.text
        message: str = response.json()["message"]
        return message

    async def key(self, wallet: EvmWallet | SolanaWallet = ALICE, **fields: Any) -> str:
        message = await self.challenge(wallet)
        signed = {"message": message, "signature": wallet.sign(message)}
        response = await self.send("POST", "/auth/keys", json={**signed, **fields})
        assert response.status_code == 201, response.text
        made: str = response.json()["key"]
        return made

    async def pay_in(self, amount: int, wallet: EvmWallet = ALICE, number: int = 1) -> None:
        await self.ledger.deposit("hyperliquid", "eip155:999", f"0x{number:064x}", wallet.address, amount)

    async def has(self, wallet: EvmWallet = ALICE) -> tuple[int, int]:
        """What the wallet may spend, and what is put aside."""
        accounts = (f"client:{wallet.address}", f"reserved:{wallet.address}")
        return await self.ledger.balance(accounts[0]), await self.ledger.balance(accounts[1])

    async def until_none_is_kept(self) -> None:
        """Wait until nothing is noted any more that outlives the coordinator."""
        query = select(func.count()).select_from(schema.kept)
        with trio.fail_after(20):
            while await self.ledger.read(lambda connection: connection.execute(query).scalar_one()):
                await trio.sleep(0.02)


def cost(positions: int) -> int:
    """What so many positions cost in the twin's model."""
    return positions * LAYERS * PRICE


# Peer ids of coordinators.
OWNER, OTHER = (Identity(bytes([number]) * 32).peer_id for number in (7, 8))
API = ApiSettings(max_body_bytes=100_000)


@asynccontextmanager
async def open_bank(
    twin: Twin,
    folder: Path,
    template: Path,
    *,
    mode: AuthMode = "keys",
    name: str = "hyperliquid",
    is_new: bool = True,
    settings: dict[str, Any] | None = None,
    stop: trio.Event | None = None,
    owner: str = OWNER,
    api: ApiSettings = API,
    **options: Any,
) -> AsyncIterator[Bank]:
    """A coordinator that listens on loopback; `template` is an empty ledger's file, which is kept in wei."""
    if name == "hyperliquid" and is_new:
        shutil.copyfile(template, folder / "ledger.sqlite3")
    url = f"sqlite:///{folder / 'ledger.sqlite3'}"
    async with (
        provider(name, settings) as chain,
        Ledger.open(url, currency=chain.coin.unit, owner=owner, key_limits=key_limits) as ledger,
        trio.open_nursery() as nursery,
    ):
        twin.ledger = ledger
        money = Money(ledger, chain, mode, PRICE, **options)
        await ledger.release_abandoned()
        app = create_app(twin, api, money=money)
        listening: str = await nursery.start(partial(serve_http, app, "127.0.0.1", 0, stop=stop, grace_s=0.1))
        # One client, without TLS: to make one takes longer than most requests.
        with httpx.Client(base_url=listening, timeout=30, verify=False, trust_env=False) as web:  # noqa: S501
            yield Bank(web, ledger, twin, money)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def write_locked(path: Path) -> AsyncIterator[None]:
    """Whoever wants to write to a SQLite file waits for as long as the context lasts."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
