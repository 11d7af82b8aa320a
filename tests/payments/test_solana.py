"""Deposits and payouts on Solana's own runtime."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

from azu.errors import NetworkError
from azu.payments import Deposit, Refusal, SignedPayout
from azu.payments.rpc import Limits, Rpc
from azu.payments.solana import Solana, chain_check
from azu.payments.solana_account import solana_account
from tests.payments.http_server import Reply
from tests.payments.proxy import Proxy, open_proxy
from tests.payments.solana_runtime import GENESIS

SEED = bytes([7]) * 32
PLATFORM = Keypair.from_seed(SEED).pubkey()
ANN, BOB = Keypair.from_seed(bytes([1]) * 32), Keypair.from_seed(bytes([2]) * 32)
WORKER = str(Keypair.from_seed(bytes([3]) * 32).pubkey())
COIN = 10**9
FEE = 5_000
LEAST = 100_000

Ask = Callable[..., Any]


@asynccontextmanager
async def opened(*urls: str) -> AsyncIterator[Solana]:
    with trio.fail_after(60):
        async with Rpc(urls, chain_check(GENESIS), limits=Limits(5.0, 1.0)) as rpc:
            account = solana_account(SEED)
            yield Solana(rpc, genesis=GENESIS, address=account.address, account=account, min_deposit=LEAST)


@pytest.fixture(autouse=True)
def funded(ask: Ask) -> None:
    for who in (PLATFORM, ANN.pubkey(), BOB.pubkey()):
        ask("airdrop", str(who), 10 * COIN)


@pytest.fixture
def proxy(solana: str) -> Iterator[Proxy]:
    with open_proxy(solana) as opened_proxy:
        yield opened_proxy


def move(sender: Keypair, to: Pubkey, amount: int) -> Instruction:
    return transfer(TransferParams(from_pubkey=sender.pubkey(), to_pubkey=to, lamports=amount))


def sent(ask: Ask, instructions: list[Instruction], *signers: Keypair) -> str:
    """Send a transaction that the first of the signers pays for, and return its signature."""
    recent = Hash.from_string(ask("getLatestBlockhash")["value"]["blockhash"])
    message = Message.new_with_blockhash(instructions, signers[0].pubkey(), recent)
    raw = bytes(Transaction(list(signers), message, recent))
    options = {"encoding": "base64", "skipPreflight": True}
    return str(ask("sendTransaction", base64.b64encode(raw).decode(), options))


async def claim(url: str, txid: str, wallet: Keypair | str = ANN) -> Deposit | Refusal:
    async with opened(url) as provider:
        return await provider.verify_deposit(txid, wallet if isinstance(wallet, str) else str(wallet.pubkey()))


def code(result: object) -> str:
    assert isinstance(result, Refusal), result
    return result.code


# --- deposits ---


async def test_a_deposit_counts(solana: str, ask: Ask) -> None:
    txid = sent(ask, [move(ANN, PLATFORM, COIN + 1)], ANN)
    wallet = str(ANN.pubkey())
    assert await claim(solana, txid) == Deposit("solana", f"solana:{GENESIS[:32]}", txid, wallet, COIN + 1)


async def test_several_transfers_and_references_of_solana_pay_count_together(solana: str, ask: Ask) -> None:
    first = move(ANN, PLATFORM, COIN)
    reference = AccountMeta(Keypair.from_seed(bytes([9]) * 32).pubkey(), is_signer=False, is_writable=False)
    first = Instruction(first.program_id, first.data, [*first.accounts, reference])
    deposit = await claim(solana, sent(ask, [first, move(ANN, PLATFORM, 5), move(ANN, BOB.pubkey(), 9)], ANN))
    assert isinstance(deposit, Deposit)
    assert deposit.amount == COIN + 5


async def test_who_pays_the_fee_is_not_who_pays(solana: str, ask: Ask) -> None:
    txid = sent(ask, [move(ANN, PLATFORM, COIN)], BOB, ANN)
    assert code(await claim(solana, txid, BOB)) == "wrong_sender"
    assert isinstance(await claim(solana, txid, ANN), Deposit)


async def test_what_two_paid_together_is_neithers(solana: str, ask: Ask) -> None:
    txid = sent(ask, [move(ANN, PLATFORM, COIN), move(BOB, PLATFORM, COIN)], ANN, BOB)
    assert code(await claim(solana, txid, ANN)) == code(await claim(solana, txid, BOB)) == "wrong_sender"


async def test_a_failed_transaction_moved_nothing(solana: str, ask: Ask) -> None:
    txid = sent(ask, [move(ANN, PLATFORM, COIN), move(ANN, PLATFORM, 100 * COIN)], ANN)
    assert ask("getTransaction", txid, {"commitment": "finalized"})["meta"]["err"] is not None
    assert code(await claim(solana, txid)) == "tx_failed"


async def test_other_claims_are_refused_each_with_its_reason(solana: str, ask: Ask) -> None:
    good = sent(ask, [move(ANN, PLATFORM, COIN)], ANN)
    assert code(await claim(solana, good, BOB)) == "wrong_sender"
    assert code(await claim(solana, good, "me")) == "bad_address"
    assert code(await claim(solana, sent(ask, [move(ANN, BOB.pubkey(), COIN)], ANN))) == "wrong_recipient"
    assert code(await claim(solana, sent(ask, [move(ANN, PLATFORM, LEAST - 1)], ANN))) == "deposit_too_small"
    assert code(await claim(solana, good[:-1] + ("1" if good[-1] != "1" else "2"))) == "tx_not_found"
    for text in ("", "0x12", good + "1", good + " ", "1" * 88, "é", "x" * 10_000):
        assert code(await claim(solana, text)) == "bad_txid"


async def test_a_deposit_has_to_be_final(solana: str, ask: Ask) -> None:
    ask("setFinalized", False)
    txid = sent(ask, [move(ANN, PLATFORM, COIN)], ANN)
    assert code(await claim(solana, txid)) == "tx_unconfirmed"
    ask("setFinalized", True)
    assert isinstance(await claim(solana, txid), Deposit)


async def test_an_rpc_of_another_cluster_credits_nothing(proxy: Proxy, ask: Ask) -> None:
    txid = sent(ask, [move(ANN, PLATFORM, COIN)], ANN)
    proxy.answer("getGenesisHash", "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdpKuc147dw2N9d")
    with pytest.raises(NetworkError) as caught:
        await claim(proxy.url, txid)
    assert caught.value.code == "rpc_wrong_chain"


@pytest.mark.parametrize(
    "change",
    [{"preBalances": []}, {"postBalances": [1.5]}, {"postBalances": None}, {"fee": -1}, {"loadedAddresses": 3}],
    ids=str,
)
async def test_rubbish_is_no_answer(proxy: Proxy, ask: Ask, change: dict[str, object]) -> None:
    txid = sent(ask, [move(ANN, PLATFORM, COIN)], ANN)
    told = ask("getTransaction", txid, {"commitment": "finalized"})
    proxy.answer("getTransaction", told | {"meta": told["meta"] | change})
    with pytest.raises(NetworkError) as caught:
        await claim(proxy.url, txid)
    assert caught.value.code == "rpc_bad_answer"


# --- payouts ---


async def signed(provider: Solana, amount: int = COIN + 1, label: str = "1") -> SignedPayout:
    payout = await provider.sign_payout(WORKER, amount, label=label, after=None)
    assert isinstance(payout, SignedPayout), payout
    return payout


def balance(ask: Ask, address: str) -> int:
    return int(ask("getBalance", address)["value"])


async def test_a_payout_arrives_to_the_last_lamport(solana: str, ask: Ask) -> None:
    async with opened(solana) as provider:
        payout = await signed(provider)
        assert balance(ask, WORKER) == 0, "it is signed, and nothing was sent"
        assert (await provider.look(payout)).state == "waiting"
        ask("setFinalized", False)
        assert await provider.send(payout) is None
        assert (await provider.look(payout)).state == "waiting"
        ask("setFinalized", True)
        landing = await provider.look(payout)
        assert (landing.state, landing.fee) == ("confirmed", FEE)
    assert balance(ask, WORKER) == COIN + 1
    assert balance(ask, str(PLATFORM)) == 10 * COIN - (COIN + 1) - FEE


async def test_sent_again_it_pays_once(solana: str, ask: Ask) -> None:
    async with opened(solana) as provider:
        payout = await signed(provider)
        for _ in range(3):
            await provider.send(payout)
    assert balance(ask, WORKER) == COIN + 1


async def test_two_payouts_of_one_amount_are_two(solana: str, ask: Ask) -> None:
    async with opened(solana) as provider:
        first, second = await signed(provider, label="1"), await signed(provider, label="2")
        assert first.txid != second.txid
        for payout in (first, second):
            await provider.send(payout)
            assert (await provider.look(payout)).state == "confirmed"
    assert balance(ask, WORKER) == 2 * (COIN + 1)


async def test_an_expired_blockhash_is_lost_once_every_node_says_so(solana: str, ask: Ask, proxy: Proxy) -> None:
    async with opened(solana, proxy.url) as provider:
        payout = await signed(provider)
        ask("expireBlockhash")
        assert await provider.send(payout) is None, "a node takes it all the same"
        proxy.answer("getBlockHeight", payout.nonce)  # it lags
        assert (await provider.look(payout)).state == "waiting"
        proxy.heal()
        proxy.before = lambda question: Reply(b"", 503)
        with pytest.raises(NetworkError):
            await provider.look(payout)
    async with opened(solana) as provider:
        assert (await provider.look(payout)).state == "lost"
    assert balance(ask, WORKER) == 0


async def test_what_landed_is_not_lost_when_its_blockhash_expires(solana: str, ask: Ask) -> None:
    async with opened(solana) as provider:
        payout = await signed(provider)
        await provider.send(payout)
        ask("expireBlockhash")
        assert (await provider.look(payout)).state == "confirmed"


async def test_a_new_account_below_its_rent_is_told_before_anything_is_sent(solana: str) -> None:
    async with opened(solana) as provider:
        refusal = await provider.sign_payout(WORKER, 1_000, label="1", after=None)
        assert code(refusal) == "payee_refuses"
        assert code(await provider.sign_payout(WORKER, 10 * COIN, label="1", after=None)) == "platform_short"
        assert code(await provider.sign_payout("0x12", 1, label="1", after=None)) == "bad_address"
        for amount in (0, -1, 2**64):
            assert code(await provider.sign_payout(WORKER, amount, label="1", after=None)) == "bad_amount"


async def test_a_payout_that_fails_on_the_chain_paid_nothing(solana: str, ask: Ask) -> None:
    async with opened(solana) as provider:
        payout = await signed(provider, 9 * COIN)
        pair = Keypair.from_seed(SEED)
        sent(ask, [move(pair, ANN.pubkey(), 8 * COIN)], pair)  # the operator, by hand
        await provider.send(payout)
        landing = await provider.look(payout)
    assert (landing.state, landing.fee) == ("failed", FEE)
    assert balance(ask, WORKER) == 0
