"""`azu-coordinator payouts`, as an operator types it, on a real chain."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from azu.ledger import Ledger
from azu.payments.coin import HYPE
from coordinator.cli import main
from tests.ledger.books import PEERS, ended
from tests.payments.anvil import COIN, Chain, account
from tests.payments.proxy import Proxy

PLATFORM = account(0x9A7)
WALLETS = {peer: account(0x400 + number).address for number, peer in enumerate(PEERS)}


def payouts(folder: Path, url: str, *words: str) -> Result:
    key = folder / "key"
    key.write_text(bytes(PLATFORM.key).hex())
    key.chmod(0o600)
    variables = {
        "HYPERLIQUID_RPC_URL": url, "HYPERLIQUID_CHAIN_ID": "998", "SCHEDULER_PRIVATE_KEY": str(key),
        "AZU_HYPERLIQUID_CONFIRMATIONS": "1", "AZU_DATA_DIR": str(folder),
    }  # fmt: skip
    return CliRunner().invoke(main, ["payouts", *words], env=variables)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AZU_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


async def plan(folder: Path) -> dict[str, int]:
    async with Ledger.open(folder / "ledger.sqlite3", currency="wei") as ledger:
        await ledger.settle(ended("job", COIN + 7), is_free=True)
        owed = await ledger.balances("worker")
        for number, peer in enumerate(PEERS[:2]):
            await ledger.payout_plan(f"payout{number}", peer, "hyperliquid", WALLETS[peer], owed[peer])
    return owed


@pytest.fixture
def owed(chain: Chain, tmp_path: Path) -> dict[str, int]:
    """Two workers' payouts are planned, the third has named no wallet."""
    chain.fund(PLATFORM.address)
    return trio.run(plan, tmp_path)


def test_what_is_planned_is_shown_and_paid(chain: Chain, tmp_path: Path, owed: dict[str, int]) -> None:
    shown = payouts(tmp_path, chain.url, "list")
    assert shown.exit_code == 0, shown.stderr
    assert HYPE.format(owed[PEERS[2]]) in shown.stdout
    assert shown.stdout.count("planned") == 2
    done = payouts(tmp_path, chain.url, "run")
    assert done.exit_code == 0, done.stderr
    assert f"paid {HYPE.format(owed[PEERS[0]])} to {WALLETS[PEERS[0]]}, transaction 0x" in done.stdout
    assert {peer: chain.balance(WALLETS[peer]) for peer in PEERS} == {**owed, PEERS[2]: 0}
    again = payouts(tmp_path, chain.url, "run")
    assert (again.exit_code, again.stdout) == (0, "nothing to pay\n")
    document = json.loads(payouts(tmp_path, chain.url, "list", "--json").stdout)
    assert document["owed"] == {PEERS[2]: owed[PEERS[2]]}
    assert [each["state"] for each in document["payouts"]] == ["confirmed"] * 2
    refused = payouts(tmp_path, chain.url, "retry", "payout0")
    assert refused.exit_code == 2
    assert "was paid" in refused.stderr
    assert bytes(PLATFORM.key).hex() not in "".join(each.stderr + each.stdout for each in (shown, done, refused))


def test_what_holds_payouts_up_is_said_and_a_failed_one_is_retried(
    chain: Chain, tmp_path: Path, owed: dict[str, int]
) -> None:
    one = PEERS[0]
    chain.ask("anvil_setCode", WALLETS[one], "0x60006000fd")
    chain.fund(PLATFORM.address, 0)
    stuck = payouts(tmp_path, chain.url, "run")
    assert stuck.exit_code == 1
    assert "lacks" in stuck.stderr
    chain.fund(PLATFORM.address)
    done = payouts(tmp_path, chain.url, "run")
    assert done.exit_code == 0, done.stderr
    assert "failed" in done.stdout
    chain.ask("anvil_setCode", WALLETS[one], "0x")
    retried = payouts(tmp_path, chain.url, "retry", "payout0")
    assert retried.exit_code == 0, retried.stderr
    assert chain.balance(WALLETS[one]) == owed[one]
    assert "is owed nothing any more" in payouts(tmp_path, chain.url, "retry", "payout0").stderr


def test_wrong_words_are_answered(chain: Chain, proxy: Proxy, tmp_path: Path, owed: dict[str, int]) -> None:
    assert "there is no payout nothing" in payouts(tmp_path, chain.url, "retry", "nothing").stderr
    lost = payouts(tmp_path, chain.url, "retry", "payout1", "--payment-provider", "none")
    assert (lost.exit_code, "nobody is paid" in lost.stderr) == (2, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert payouts(empty, chain.url, "run").exit_code == 2
    assert not (empty / "ledger.sqlite3").exists()
    proxy.answer("eth_chainId", "0x3e7")
    liar = payouts(tmp_path, proxy.url, "run")
    assert liar.exit_code == 1
    assert "serves another chain than chain id 998" in liar.stderr


def test_what_never_landed_is_given_up_only_where_the_chain_agrees(
    chain: Chain, tmp_path: Path, owed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.payout_commands._LOST_S", 3.0)
    raw = PLATFORM.sign_transaction(
        {"type": 2, "chainId": 998, "nonce": 0, "to": WALLETS[PEERS[0]], "value": owed[PEERS[0]], "gas": 21_000,
         "maxFeePerGas": 10**9, "maxPriorityFeePerGas": 0}
    )  # fmt: skip

    async def sign_and_die() -> None:
        async with Ledger.open(tmp_path / "ledger.sqlite3", currency="wei") as ledger:
            await ledger.payout_signed(["payout0"], f"0x{raw.hash.hex()}", bytes(raw.raw_transaction), 0)

    trio.run(sign_and_die)
    assert "not in a block yet" in payouts(tmp_path, chain.url, "retry", "payout0", "--lost").stderr
    chain.transfer(PLATFORM, account(0x501).address, 1)
    chain.ask("evm_setIntervalMining", 1)
    try:
        done = payouts(tmp_path, chain.url, "retry", "payout0", "--lost")
    finally:
        chain.ask("evm_setIntervalMining", 0)
    assert done.exit_code == 0, done.stderr
    assert "failed, lost: an operator found" in done.stdout
    assert chain.balance(WALLETS[PEERS[0]]) == 0


@pytest.mark.parametrize("variable", ["AZU_PAYMENT_PROVIDER", "PAYMENT_PROVIDER"])
def test_a_bad_variable_is_named_as_it_was_written(variable: str) -> None:
    done = CliRunner().invoke(main, ["payouts", "list"], env={variable: "cash"})
    assert done.exit_code == 2
    assert f"the environment variable {variable}: " in done.stderr
    done = CliRunner().invoke(main, ["payouts", "list", "--payment-provider", "none"], env={variable: "cash"})
    assert "there is no ledger" in done.stderr, "what was typed counts"
