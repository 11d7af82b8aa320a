"""Chains of this machine's own: anvil's EVM, and Solana's runtime in this process."""

from __future__ import annotations

import socket
import subprocess
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from azu.demo.anvil import anvil_command, find_anvil
from azu.errors import InputError
from tests.local_swarm import wait_until
from tests.payments.anvil import CHAIN_ID, Chain
from tests.payments.proxy import Proxy, open_proxy
from tests.payments.solana_runtime import open_solana

ANVIL_HOME = Path(__file__).parents[2] / ".cache/anvil"


@pytest.fixture(scope="session")
def anvil() -> Iterator[Chain]:
    """One chain for all tests, which keep to wallets of their own and leave it mining. Without npm they are skipped."""
    try:
        binary = find_anvil(ANVIL_HOME)
    except InputError as error:
        pytest.skip(f"NO CHAIN, so nothing here shows that deposits and payouts work: {error}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(anvil_command(binary, port, CHAIN_ID, "--silent"), stdin=subprocess.DEVNULL)
    chain = Chain(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: _answers(chain), "anvil")
        yield chain
    finally:
        process.terminate()
        process.wait(30)


def _answers(chain: Chain) -> bool:
    try:
        return int(chain.ask("eth_chainId"), 16) == CHAIN_ID
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture
def chain(anvil: Chain) -> Iterator[Chain]:
    """The chain, as it was once the test is over."""
    fee = anvil.ask("eth_getBlockByNumber", "latest", False)["baseFeePerGas"]
    before = anvil.ask("evm_snapshot")
    yield anvil
    anvil.ask("evm_setAutomine", True)
    assert anvil.ask("evm_revert", before) is True
    anvil.ask("anvil_setNextBlockBaseFeePerGas", fee)  # which is no part of a snapshot


@pytest.fixture
def proxy(chain: Chain) -> Iterator[Proxy]:
    """A proxy in front of the chain."""
    with open_proxy(chain.url) as opened:
        yield opened


@pytest.fixture
def solana() -> Iterator[str]:
    """The URL of a Solana node."""
    with open_solana() as url:
        yield url


@pytest.fixture
def ask(solana: str) -> Callable[..., object]:
    """Asks the Solana node past the code under test."""
    return Chain(solana).ask
