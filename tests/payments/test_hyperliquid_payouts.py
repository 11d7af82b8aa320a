"""Payouts on a real EVM chain, one transaction at a time: to the last wei, and never twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from azu.errors import NetworkError
from azu.payments import HYPE, Refusal, SignedPayout
from azu.payments.evm_account import EvmAccount, evm_account
from azu.payments.hyperliquid import Hyperliquid, chain_check
from azu.payments.rpc import Limits, Rpc
from tests.payments.anvil import CHAIN_ID, COIN, Chain, account
from tests.payments.proxy import Proxy

KEY = (0x9A7).to_bytes(32, "big")
PLATFORM = account(0x9A7)
WORKER, OTHER = account(0x301).address, account(0x302).address
CONFIRMATIONS = 2


@asynccontextmanager
async def opened(*urls: str, signer: EvmAccount | None = None) -> AsyncIterator[Hyperliquid]:
    signer = signer or evm_account(KEY)
    with trio.fail_after(60):
        async with Rpc(urls, chain_check(CHAIN_ID), limits=Limits(2.0, 1.0)) as rpc:
            terms = {"chain_id": CHAIN_ID, "confirmations": CONFIRMATIONS, "min_deposit": 1}
            yield Hyperliquid(rpc, address=signer.address, account=signer, **terms)


@pytest.fixture(autouse=True)
def funded(chain: Chain) -> None:
    chain.fund(PLATFORM.address)


async def signed(
    provider: Hyperliquid, payee: str = WORKER, amount: int = COIN + 1, after: int | None = None
) -> SignedPayout:
    payout = await provider.sign_payout(payee, amount, label="1", after=after)
    assert isinstance(payout, SignedPayout), payout
    return payout


def code(result: SignedPayout | Refusal) -> str:
    assert isinstance(result, Refusal), result
    return result.code


async def test_a_payout_arrives_to_the_last_wei(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
        assert chain.balance(WORKER) == 0, "it is signed, and nothing was sent"
        assert (await provider.look(payout)).state == "waiting"
        assert await provider.send(payout) is None
        assert (await provider.look(payout)).state == "waiting"
        chain.mine()
        landing = await provider.look(payout)
        assert landing.state == "confirmed"
        assert chain.balance(WORKER) == await provider.balance(WORKER) == COIN + 1
        assert chain.balance(PLATFORM.address) == 100 * COIN - (COIN + 1) - landing.fee
        assert landing.fee > 0


async def test_it_tips_nobody(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
        await provider.send(payout)
    told = chain.ask("eth_getTransactionByHash", payout.txid)
    assert (told["type"], int(told["maxPriorityFeePerGas"], 16), int(told["chainId"], 16)) == ("0x2", 0, CHAIN_ID)


async def test_sent_again_it_pays_once(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
        for _ in range(3):
            await provider.send(payout)
            chain.mine()
        assert chain.balance(WORKER) == COIN + 1
        assert chain.count(PLATFORM.address) == 1


async def test_an_answer_that_was_lost_is_no_second_payment(chain: Chain, proxy: Proxy) -> None:
    """The node took it and the answer never came: it is sent again, through whichever URL answers."""
    async with opened(proxy.url) as provider:
        payout = await signed(provider)
        proxy.swallow("eth_sendRawTransaction")
        with pytest.raises(NetworkError):
            await provider.send(payout)
        proxy.heal()
        chain.mine()
        assert isinstance(await provider.send(payout), Refusal)  # the node's own word: it has it
        assert (await provider.look(payout)).state == "confirmed"
    assert chain.balance(WORKER) == COIN + 1


async def test_payouts_under_way_have_nonces_in_a_row(chain: Chain) -> None:
    chain.ask("evm_setAutomine", False)
    async with opened(chain.url) as provider:
        payouts, after = [], None
        for number in range(3):
            payout = await signed(provider, amount=number + 1, after=after)
            await provider.send(payout)
            payouts.append(payout)
            after = payout.nonce
        chain.mine(CONFIRMATIONS)
        assert [(await provider.look(payout)).state for payout in payouts] == ["confirmed"] * 3
    assert [payout.nonce for payout in payouts] == [0, 1, 2]
    assert chain.balance(WORKER) == 6


async def test_a_payout_that_a_reorg_took_back_is_sent_again(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
        before = chain.ask("evm_snapshot")
        await provider.send(payout)
        chain.ask("evm_revert", before)
        chain.mine(CONFIRMATIONS)
        assert (await provider.look(payout)).state == "waiting"
        assert chain.balance(WORKER) == 0
        await provider.send(payout)
        chain.mine()
        assert (await provider.look(payout)).state == "confirmed"
    assert chain.balance(WORKER) == COIN + 1


async def test_a_receipt_of_a_replaced_block_confirms_nothing(chain: Chain, proxy: Proxy) -> None:
    async with opened(proxy.url) as provider:
        payout = await signed(provider)
        await provider.send(payout)
        chain.mine()
        block = chain.ask("eth_getBlockByNumber", "latest", False)
        proxy.answer("eth_getBlockByNumber", block | {"hash": "0x" + "ab" * 32})
        assert (await provider.look(payout)).state == "waiting"


async def test_a_nonce_that_another_transaction_took_is_lost_for_good(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
        chain.transfer(PLATFORM, OTHER, 1)  # the operator, by hand
        assert (await provider.look(payout)).state == "waiting", "the block may be replaced yet"
        chain.mine(CONFIRMATIONS)
        assert (await provider.look(payout)).state == "lost"
        assert isinstance(await provider.send(payout), Refusal)
    assert chain.balance(WORKER) == 0


async def test_nothing_is_lost_while_one_rpc_knows_it_or_is_silent(chain: Chain, proxy: Proxy) -> None:
    """The first RPC has forgotten the transaction, as one that keeps no history would."""
    async with opened(proxy.url, chain.url) as provider:
        payout = await signed(provider)
        await provider.send(payout)
        chain.mine()
        forgets = ("eth_getTransactionReceipt", "eth_getTransactionByHash")
        for method in forgets:
            proxy.answer(method, None)
        for _ in range(3):
            chain.mine(CONFIRMATIONS)
            assert (await provider.look(payout)).state == "waiting"
    async with opened(chain.url, proxy.url) as provider:
        other = await signed(provider)
        chain.transfer(PLATFORM, OTHER, 1)
        proxy.rate_limit()
        for _ in range(3):
            chain.mine(CONFIRMATIONS)
            with pytest.raises(NetworkError):
                await provider.look(other)


async def test_anothers_key_does_not_declare_it_lost(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
    stranger = account(0x999)
    chain.fund(stranger.address)
    for _ in range(2):
        chain.transfer(stranger, OTHER, 1)
    async with opened(chain.url, signer=evm_account((0x999).to_bytes(32, "big"))) as provider:
        for _ in range(3):
            chain.mine(CONFIRMATIONS)
            landing = await provider.look(payout)
            assert landing.state == "waiting"
            assert "another key" in landing.reason


async def test_a_payee_that_refuses_is_told_before_anything_is_signed(chain: Chain) -> None:
    chain.ask("anvil_setCode", OTHER, "0x60006000fd")
    greedy = account(0x303).address
    chain.ask("anvil_setCode", greedy, "0x5b600056")  # JUMPDEST, PUSH1 0, JUMP: burns all the gas that it gets
    async with opened(chain.url) as provider:
        assert code(await provider.sign_payout(OTHER, 1, label="1", after=None)) == "payee_refuses"
        assert code(await provider.sign_payout(greedy, 1, label="1", after=None)) == "payee_refuses"


async def test_a_payee_that_refuses_later_has_failed(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        payout = await signed(provider)
        chain.ask("anvil_setCode", WORKER, "0x60006000fd")
        await provider.send(payout)
        chain.mine()
        landing = await provider.look(payout)
    assert landing.state == "failed"
    assert chain.balance(PLATFORM.address) == 100 * COIN - landing.fee


async def test_a_contract_wallet_is_paid(chain: Chain) -> None:
    chain.ask("anvil_setCode", OTHER, "0x60016000555b00")  # stores a word, as a wallet that counts might
    chain.fund(OTHER, 0)
    async with opened(chain.url) as provider:
        payout = await signed(provider, payee=OTHER)
        await provider.send(payout)
        chain.mine()
        assert (await provider.look(payout)).state == "confirmed"
    assert chain.balance(OTHER) == COIN + 1


async def test_what_the_platform_lacks_is_told(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        refusal = await provider.sign_payout(WORKER, 100 * COIN, label="1", after=None)
    assert code(refusal) == "platform_short"
    assert isinstance(refusal, Refusal)
    assert HYPE.symbol in refusal.message


@pytest.mark.parametrize("amount", [0, -1, 2**128])
async def test_what_is_no_amount_is_not_paid(chain: Chain, amount: int) -> None:
    async with opened(chain.url) as provider:
        assert code(await provider.sign_payout(WORKER, amount, label="1", after=None)) == "bad_amount"


async def test_a_payee_that_is_none_is_not_paid(chain: Chain) -> None:
    async with opened(chain.url) as provider:
        assert code(await provider.sign_payout("me", 1, label="1", after=None)) == "bad_address"
