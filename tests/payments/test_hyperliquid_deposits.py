"""Deposits on a real EVM chain: those that count, and every kind that does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from azu.errors import NetworkError
from azu.payments import Deposit, Refusal
from azu.payments.hyperliquid import Hyperliquid, chain_check
from azu.payments.rpc import Limits, Rpc
from tests.payments.anvil import CHAIN_ID, COIN, Chain, account
from tests.payments.proxy import Proxy

ANN, BOB = account(0xA11), account(0xB0B)
PLATFORM = account(0x9A7).address
LEAST = COIN // 1000


@asynccontextmanager
async def opened(*urls: str) -> AsyncIterator[Hyperliquid]:
    with trio.fail_after(60):
        async with Rpc(urls, chain_check(CHAIN_ID), limits=Limits(2.0, 1.0)) as rpc:
            yield Hyperliquid(
                rpc, chain_id=CHAIN_ID, address=PLATFORM, account=None, confirmations=3, min_deposit=LEAST
            )


@pytest.fixture
def sent(chain: Chain) -> str:
    """Ann's deposit, of an odd number of wei."""
    chain.fund(ANN.address)
    chain.fund(BOB.address)
    return chain.transfer(ANN, PLATFORM, COIN + 1)


async def claim(url: str, txid: str, wallet: str = ANN.address) -> Deposit | Refusal:
    async with opened(url) as provider:
        return await provider.verify_deposit(txid, wallet)


def code(result: Deposit | Refusal) -> str:
    assert isinstance(result, Refusal), result
    assert result.message
    return result.code


async def test_a_deposit_counts_once_it_is_final(chain: Chain, sent: str) -> None:
    assert code(await claim(chain.url, sent)) == "tx_unconfirmed"
    chain.mine(2)
    deposit = Deposit("hyperliquid", "eip155:998", sent, ANN.address, COIN + 1)
    assert await claim(chain.url, sent) == deposit
    # However it is spelt, it is one deposit.
    assert await claim(chain.url, "0x" + sent[2:].upper(), ANN.address.lower()) == deposit


@pytest.mark.parametrize("txid", ["", "0x", "0x12", "12" * 32, "0x" + "zz" * 32, "0x" + "12" * 33, "x" * 10_000])
async def test_what_is_no_hash_is_refused(chain: Chain, txid: str) -> None:
    assert code(await claim(chain.url, txid)) == "bad_txid"


async def test_a_wallet_that_is_none_is_refused(chain: Chain, sent: str) -> None:
    assert code(await claim(chain.url, sent, "me")) == "bad_address"


async def test_an_unknown_transaction_is_not_found(chain: Chain) -> None:
    assert code(await claim(chain.url, "0x" + "12" * 32)) == "tx_not_found"


async def test_a_pending_transaction_has_to_wait(chain: Chain) -> None:
    chain.fund(ANN.address)
    chain.ask("evm_setAutomine", False)
    txid = chain.transfer(ANN, PLATFORM, COIN)
    assert code(await claim(chain.url, txid)) == "tx_pending"
    chain.mine(3)
    assert isinstance(await claim(chain.url, txid), Deposit)


async def test_anothers_deposit_is_not_ones_own(chain: Chain, sent: str) -> None:
    chain.mine(2)
    assert code(await claim(chain.url, sent, BOB.address)) == "wrong_sender"


async def test_what_pays_somebody_else_is_no_deposit(chain: Chain) -> None:
    chain.fund(ANN.address)
    assert code(await claim(chain.url, chain.transfer(ANN, BOB.address, COIN))) == "wrong_recipient"


async def test_a_new_contract_is_no_deposit(chain: Chain) -> None:
    chain.fund(ANN.address)
    txid = chain.transfer(ANN, None, 0, data="0x00", gas=200_000)
    assert code(await claim(chain.url, txid)) == "wrong_recipient"


async def test_what_a_contract_passes_on_is_no_deposit(chain: Chain) -> None:
    chain.fund(ANN.address)
    # CALL(gas, PLATFORM, callvalue, 0, 0, 0, 0)
    forwarder = chain.deploy(ANN, f"60006000600060003473{PLATFORM[2:]}5af100")
    before = chain.balance(PLATFORM)
    txid = chain.transfer(ANN, forwarder, COIN)
    chain.mine(2)
    assert chain.balance(PLATFORM) == before + COIN
    assert code(await claim(chain.url, txid)) == "wrong_recipient"


async def test_too_little_is_refused(chain: Chain) -> None:
    chain.fund(ANN.address)
    assert code(await claim(chain.url, chain.transfer(ANN, PLATFORM, LEAST - 1))) == "deposit_too_small"
    assert code(await claim(chain.url, chain.transfer(ANN, PLATFORM, 0))) == "deposit_too_small"
    enough = chain.transfer(ANN, PLATFORM, LEAST)
    chain.mine(2)
    assert isinstance(await claim(chain.url, enough), Deposit)


async def test_a_failed_transaction_moved_nothing(chain: Chain) -> None:
    chain.fund(ANN.address)
    chain.ask("anvil_setCode", PLATFORM, "0x60006000fd")  # an address that refuses: revert(0, 0)
    txid = chain.transfer(ANN, PLATFORM, COIN)
    chain.mine(2)
    assert code(await claim(chain.url, txid)) == "tx_failed"


async def test_a_deposit_that_a_reorg_took_back_is_not_credited(chain: Chain) -> None:
    chain.fund(ANN.address)
    before = chain.ask("evm_snapshot")
    txid = chain.transfer(ANN, PLATFORM, COIN)
    chain.mine(2)
    assert isinstance(await claim(chain.url, txid), Deposit)
    chain.ask("evm_revert", before)
    assert code(await claim(chain.url, txid)) == "tx_not_found"


async def test_a_block_that_is_replaced_while_it_is_read_is_noticed(proxy: Proxy, chain: Chain, sent: str) -> None:
    chain.mine(2)
    transaction = chain.ask("eth_getTransactionByHash", sent)
    # The node that tells of the transaction has not heard yet that its block was replaced.
    proxy.answer("eth_getTransactionByHash", {**transaction, "blockHash": "0x" + "ab" * 32})
    assert code(await claim(proxy.url, sent)) == "tx_reorganised"
    proxy.answer(
        "eth_getTransactionReceipt", chain.ask("eth_getTransactionReceipt", sent) | {"blockHash": "0x" + "ab" * 32}
    )
    assert code(await claim(proxy.url, sent)) == "tx_reorganised"
    proxy.heal()
    block = chain.ask("eth_getBlockByNumber", transaction["blockNumber"], False)
    proxy.answer("eth_getBlockByNumber", block | {"hash": "0x" + "ab" * 32})
    assert code(await claim(proxy.url, sent)) == "tx_reorganised"
    proxy.answer("eth_getBlockByNumber", None)
    assert code(await claim(proxy.url, sent)) == "tx_reorganised"
    proxy.heal()
    assert isinstance(await claim(proxy.url, sent), Deposit)


async def test_a_receipt_may_lag(proxy: Proxy, chain: Chain, sent: str) -> None:
    proxy.answer("eth_getTransactionReceipt", None)
    assert code(await claim(proxy.url, sent)) == "tx_pending"


async def test_a_transaction_of_another_chain_is_refused(proxy: Proxy, chain: Chain, sent: str) -> None:
    chain.mine(2)
    proxy.answer("eth_getTransactionByHash", chain.ask("eth_getTransactionByHash", sent) | {"chainId": "0x1"})
    assert code(await claim(proxy.url, sent)) == "wrong_chain"


async def test_a_node_that_tells_of_another_transaction_is_not_believed(proxy: Proxy, chain: Chain, sent: str) -> None:
    proxy.answer("eth_getTransactionByHash", chain.ask("eth_getTransactionByHash", sent) | {"hash": "0x" + "12" * 32})
    assert code(await claim(proxy.url, sent)) == "tx_not_found"


@pytest.mark.parametrize(
    "change",
    [{"value": 5}, {"value": "5"}, {"value": None}, {"from": None}, {"hash": 7}, {"blockNumber": "x"}, {"to": {}}],
    ids=str,
)
async def test_rubbish_is_no_answer(proxy: Proxy, chain: Chain, sent: str, change: dict[str, object]) -> None:
    proxy.answer("eth_getTransactionByHash", chain.ask("eth_getTransactionByHash", sent) | change)
    with pytest.raises(NetworkError) as caught:
        await claim(proxy.url, sent)
    assert caught.value.code == "rpc_bad_answer"


async def test_an_rpc_of_another_chain_credits_nothing(proxy: Proxy, chain: Chain, sent: str) -> None:
    chain.mine(2)
    proxy.answer("eth_chainId", "0x3e7")
    with pytest.raises(NetworkError) as caught:
        await claim(proxy.url, sent)
    assert caught.value.code == "rpc_wrong_chain"
    async with opened(proxy.url, chain.url) as provider:
        assert isinstance(await provider.verify_deposit(sent, ANN.address), Deposit)
