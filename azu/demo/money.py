"""The demo's money: a chain of its own, wallets with coins on it, a deposit, and what the workers were paid."""

from __future__ import annotations

import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from azu.demo.anvil import anvil_command, find_anvil
from azu.errors import InternalError, NetworkError
from azu.payments.base import Refusal, SignedPayout
from azu.payments.coin import HYPE
from azu.payments.evm_account import EvmAccount, evm_account
from azu.payments.hyperliquid import Hyperliquid, chain_check
from azu.payments.rpc import Rpc

__all__ = ["Money", "MoneyFigures", "open_money"]

_CHAIN_ID = 998  # HyperEVM's test network
_FUNDS = HYPE.parse("10")
_DEPOSIT = HYPE.parse("1")
# An answer of the demo is worth some millionths of a coin: it shall be paid all the same.
_THRESHOLD = "0.00000001"
_PAY_EVERY_S = 1
_ANVIL_HOME = Path("~/.azu/anvil")
_PATIENCE_S = 120.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class MoneyFigures:
    """Balances read from the chain at the end, in wei; `available` is what the client may still spend."""

    chain: str
    deposit_tx: str
    deposited: int
    available: int
    client: int
    platform: int
    workers: dict[str, int]  # by the worker's name
    wallets: dict[str, str]  # addresses: client, platform and workers, by name


class Money:
    """Wallets on the demo's chain. Keys of the client's and the workers' live in this process only."""

    def __init__(self, url: str, rpc: Rpc, folder: Path) -> None:
        self._url = url
        self._rpc = rpc
        self._key_file = folder / "platform.key"
        self._platform = _new_key(self._key_file)
        self._client = evm_account(secrets.token_bytes(32))
        self._provider = Hyperliquid(
            rpc, chain_id=_CHAIN_ID, address=self._client.address, account=self._client, confirmations=2, min_deposit=1
        )
        self._workers: dict[str, str] = {}
        self._deposit_tx = ""

    async def fund(self) -> None:
        """Give the client and the platform, which pays the fees of payouts, some coins."""
        for account in (self._client, self._platform):
            await self._rpc.call("anvil_setBalance", account.address, hex(_FUNDS), read=lambda _: None)

    def coordinator(self) -> tuple[list[str], Mapping[str, str]]:
        """The coordinator's options, and its environment: a key is no option."""
        options = {
            "--payment-provider": "hyperliquid", "--hyperliquid-rpc-url": self._url,
            "--hyperliquid-chain-id": str(_CHAIN_ID), "--payout-threshold": _THRESHOLD,
            "--payout-every": str(_PAY_EVERY_S),
        }  # fmt: skip
        return [word for option in options.items() for word in option], {
            "AZU_SCHEDULER_PRIVATE_KEY": str(self._key_file)
        }

    def worker(self, name: str) -> list[str]:
        """A worker's options: the wallet that it is paid into, which is a new one."""
        self._workers[name] = evm_account(secrets.token_bytes(32)).address
        return ["--payout-address", self._workers[name]]

    async def sign_in(self, client: httpx.AsyncClient) -> str:
        """An API key of the client's wallet.

        Raises:
            NetworkError: the coordinator refuses.
        """
        challenge = await _post(client, "/auth/challenge", {"address": self._client.address})
        message = str(challenge["message"])
        signed = {"message": message, "signature": self._client.sign_text(message), "name": "azu-demo"}
        return str((await _post(client, "/auth/keys", signed))["key"])

    async def deposit(self, client: httpx.AsyncClient) -> None:
        """Send coins to the platform, and claim them once they are final.

        Raises:
            NetworkError: the coordinator refuses, or the chain stands still.
        """
        signed = await self._provider.sign_payout(self._platform.address, _DEPOSIT, label="deposit", after=None)
        if isinstance(signed, Refusal):
            raise InternalError(signed.message, code=signed.code, remedy=signed.remedy)
        await self._provider.send(signed)
        self._deposit_tx = signed.txid
        claim = {"tx_sig": signed.txid, "user_pubkey": self._client.address}
        with _patience("the deposit did not become final"):
            await self._until_confirmed(signed)
        await _post(client, "/deposit", claim)

    async def figures(self, client: httpx.AsyncClient, earned: Mapping[str, int]) -> MoneyFigures:
        """What everybody has on the chain, once each worker has been paid what it earned.

        Args:
            earned: wei, by the worker's name.

        Raises:
            NetworkError: a worker is not paid.
        """
        with _patience("not every worker was paid"):
            await self._until_paid(earned)
        answer = (await client.get("/balance")).json()
        wallets = {"client": self._client.address, "platform": self._platform.address}
        own = await self._balances(wallets)
        return MoneyFigures(
            chain=self._provider.chain,
            deposit_tx=self._deposit_tx,
            deposited=_DEPOSIT,
            available=int(answer["available"]),
            client=own["client"],
            platform=own["platform"],
            workers=await self._balances(self._workers),
            wallets=wallets | self._workers,
        )

    async def _until_confirmed(self, payment: SignedPayout) -> None:
        while (await self._provider.look(payment)).state != "confirmed":  # noqa: ASYNC110 - it happens on the chain
            await trio.sleep(_LOOK_S)

    async def _until_paid(self, earned: Mapping[str, int]) -> None:
        while not _covers(await self._balances(self._workers), earned):  # noqa: ASYNC110 - it happens on the chain
            await trio.sleep(_LOOK_S)

    async def _balances(self, wallets: Mapping[str, str]) -> dict[str, int]:
        return {name: await self._provider.balance(address) for name, address in wallets.items()}


@contextmanager
def _patience(otherwise: str) -> Iterator[None]:
    with trio.move_on_after(_PATIENCE_S) as patience:
        yield
    if patience.cancelled_caught:
        raise NetworkError(f"{otherwise} within {_PATIENCE_S:g} s", code="demo_failed")


@asynccontextmanager
async def open_money(folder: Path) -> AsyncIterator[Money]:
    """A chain that makes a block a second, with funded wallets; it ends with the context.

    Raises:
        InputError: anvil is not to be had.
        NetworkError: it does not start.
    """
    binary = await trio.to_thread.run_sync(find_anvil, _ANVIL_HOME)
    port = _free_port()
    command = anvil_command(binary, port, _CHAIN_ID, "--block-time", "1", "--silent")
    url = f"http://127.0.0.1:{port}"
    async with trio.open_nursery() as nursery, Rpc([url], chain_check(_CHAIN_ID)) as rpc:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "check": False}
        await nursery.start(partial(trio.run_process, command, **quiet))
        money = Money(url, rpc, folder)
        await money.fund()
        try:
            yield money
        finally:
            nursery.cancel_scope.cancel()


def _covers(paid: Mapping[str, int], earned: Mapping[str, int]) -> bool:
    return all(paid[name] >= amount for name, amount in earned.items())


def _new_key(path: Path) -> EvmAccount:
    key = secrets.token_bytes(32)
    path.touch(mode=0o600)
    path.write_text(key.hex())
    return evm_account(key)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _post(client: httpx.AsyncClient, path: str, body: Mapping[str, object]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    answer = response.json()
    if response.status_code >= 400:
        raise NetworkError(f"{path}: {answer['error']['message']}", code=str(answer["error"].get("code") or "failed"))
    return dict(answer)
