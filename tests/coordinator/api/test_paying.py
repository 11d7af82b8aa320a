"""Answers cost what was delivered, to the last wei, and nobody gets one that could cost more than there is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
from openai.types.chat import ChatCompletion, ChatCompletionUserMessageParam

from azu.errors import CapacityError, NetworkError
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.paying import ALICE, BOB, PLATFORM, PRICE, Bank, cost, open_bank
from tests.coordinator.api.twin import CONTEXT, LAYERS, MODEL_ID, Twin

QUESTION: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
BODY: dict[str, Any] = {"model": MODEL_ID, "messages": QUESTION, "max_tokens": 40}


@pytest.fixture
async def bank(twin: Twin, tmp_path: Path, empty_ledger: Path) -> AsyncIterator[Bank]:
    twin.price = PRICE
    async with open_bank(twin, tmp_path, empty_ledger) as made:
        yield made
        assert await made.ledger.verify() == []


def client(bank: Bank, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{bank.url}/v1", api_key=key, max_retries=0, timeout=30)


async def ask(bank: Bank, key: str, **options: Any) -> ChatCompletion:
    with client(bank, key) as made:
        create: Callable[[], ChatCompletion] = partial(
            made.chat.completions.create, model=MODEL_ID, messages=QUESTION, **{"max_tokens": 40, **options}
        )
        return await in_thread(create)


@asynccontextmanager
async def stalled(bank: Bank, key: str, *, stream: bool) -> AsyncIterator[None]:
    """A request whose answer stops after five tokens; its client hangs up at the end."""
    bank.twin.stall_after = 5
    post = {"json": {**BODY, "stream": stream}, "headers": {"Authorization": f"Bearer {key}"}}
    async with httpx.AsyncClient(timeout=30) as web, trio.open_nursery() as nursery:
        nursery.start_soon(partial(web.post, f"{bank.url}/v1/chat/completions", **post))
        with trio.fail_after(20):
            await bank.twin.stalled.wait()
        yield
        nursery.cancel_scope.cancel()


def azu_usage(answer: Any) -> dict[str, Any]:
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    usage: dict[str, Any] = answer.usage.model_extra["azu"]
    return usage


async def highest(bank: Bank, key: str, **changes: Any) -> int:
    """What the coordinator says a request may cost."""
    preview = await bank.send("POST", "/v1/pricing", key=key, json={**BODY, **changes})
    assert preview.status_code == 200, preview.text
    return int(preview.json()["cost"])


async def test_an_answer_costs_what_was_delivered(bank: Bank) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    answer = await ask(bank, key)
    assert answer.choices[0].message.content == bank.twin.answer
    assert answer.usage is not None
    positions = answer.usage.total_tokens - 1
    assert azu_usage(answer)["token_layers"] == positions * LAYERS
    assert int(azu_usage(answer)["cost"]) == cost(positions)
    assert await bank.has() == (10**18 - cost(positions), 0)
    balance = (await bank.send("GET", "/balance", key=key)).json()
    assert (balance["available"], balance["reserved"]) == (str(10**18 - cost(positions)), 0)
    assert balance["deposit"]["address"] == PLATFORM
    (use,) = (await bank.send("GET", "/usage", key=key)).json()["data"]
    assert (int(use["cost"]), use["token_layers"]) == (cost(positions), positions * LAYERS)
    assert use["key_id"] == key.split("-")[1]
    assert bank.twin.requests[0].account == ALICE.address, "requests wait in turns of wallets"


async def test_without_a_key_the_client_says_so(bank: Bank) -> None:
    with pytest.raises(openai.AuthenticationError, match="not known here") as caught:
        await ask(bank, "azu-wrong")
    assert caught.value.code == "invalid_api_key"


async def test_without_money_the_error_says_what_is_missing_and_how_to_pay(bank: Bank) -> None:
    key = await bank.key()
    needed = await highest(bank, key)
    await bank.pay_in(needed - 1)
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(bank, key)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (
        402,
        "insufficient_funds",
        "insufficient_quota",
    )
    for part in (PLATFORM, "eip155:999", "POST /deposit", "HYPE"):
        assert part in caught.value.message
    assert isinstance(caught.value.body, dict)
    details = caught.value.body["azu"]
    assert [int(details[name]) for name in ("required", "available", "missing")] == [needed, needed - 1, 1]
    assert details["deposit"]["address"] == PLATFORM
    assert await bank.has() == (needed - 1, 0)
    assert bank.twin.requests == []
    await bank.pay_in(1, number=2)
    await ask(bank, key)


async def test_the_highest_cost_is_put_aside_while_it_runs(bank: Bank) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    needed = await highest(bank, key)
    async with stalled(bank, key, stream=False):
        assert await bank.has() == (10**18 - needed, needed)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_pays_for_what_came(bank: Bank, stream: bool) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    async with stalled(bank, key, stream=stream):
        pass
    with trio.fail_after(20):
        while (await bank.has())[1]:
            await trio.sleep(0.02)
    positions = len(bank.twin.requests[0].prompt) + 5 - 1
    assert await bank.has() == (10**18 - cost(positions), 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_what_fails_costs_what_came(bank: Bank, stream: bool) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    bank.twin.refusal = CapacityError("full")
    with pytest.raises(openai.InternalServerError):
        await ask(bank, key, stream=stream)
    assert await bank.has() == (10**18, 0)
    bank.twin.refusal, bank.twin.failure = None, NetworkError("lost")
    with pytest.raises(openai.APIError):
        await ask(bank, key, stream=stream)
    assert await bank.has() == (10**18, 0)
    bank.twin.fail_after = 3
    response = await bank.send("POST", "/v1/chat/completions", key=key, json={**BODY, "stream": stream})
    assert "lost" in response.text
    assert await bank.has() == (10**18 - cost(len(bank.twin.requests[-1].prompt) + 3 - 1), 0)


async def test_two_requests_that_together_exceed_the_balance(bank: Bank) -> None:
    key, other = await bank.key(), await bank.key()
    await bank.pay_in(2 * await highest(bank, key) - 1)
    bank.twin.pause_s = 0.05
    outcomes: list[int] = []

    async def send(with_key: str) -> None:
        response = await bank.send("POST", "/v1/chat/completions", key=with_key, json=BODY)
        outcomes.append(response.status_code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, key)
        nursery.start_soon(send, other)
    assert sorted(outcomes) == [200, 402]
    assert (await bank.has())[1] == 0


async def test_a_keys_limit_holds_over_its_whole_life(bank: Bank) -> None:
    free = await bank.key()
    needed = await highest(bank, free)
    limited = await bank.key(spending_limit=str(needed))
    await bank.pay_in(10**18)
    spent = int(azu_usage(await ask(bank, limited))["cost"])
    response = await bank.send("POST", "/v1/chat/completions", key=limited, json=BODY)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (402, "key_limit")
    assert int(error["azu"]["available"]) == needed - spent
    assert "deposit" not in error["azu"]
    await ask(bank, free)
    manager = await bank.key(scopes=["keys"])
    listed = (await bank.send("GET", "/auth/keys", key=manager)).json()["data"]
    assert [int(entry["spent"]) for entry in listed if entry["id"] == limited.split("-")[1]] == [spent]


async def test_choices_are_put_aside_for_together_or_not_at_all(bank: Bank) -> None:
    key = await bank.key()
    needed = await highest(bank, key, n=3)
    assert needed == 3 * await highest(bank, key)
    await bank.pay_in(needed - 1)
    response = await bank.send("POST", "/v1/chat/completions", key=key, json={**BODY, "n": 3})
    assert response.status_code == 402
    details = response.json()["error"]["azu"]
    assert [int(details[name]) for name in ("required", "available", "missing")] == [needed, needed - 1, 1]
    assert bank.twin.requests == []
    assert await bank.has() == (needed - 1, 0)
    await bank.pay_in(1, number=2)
    answer = await ask(bank, key, n=3)
    assert await bank.has() == (needed - int(azu_usage(answer)["cost"]), 0)


async def test_a_stream_ends_with_its_cost(bank: Bank) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    with client(bank, key) as made:
        chunks = await in_thread(
            lambda: list(
                made.chat.completions.create(
                    model=MODEL_ID, messages=QUESTION, stream=True, stream_options={"include_usage": True}
                )
            )
        )
    used = azu_usage(chunks[-1])
    assert int(used["cost"]) == used["token_layers"] * PRICE
    assert (await bank.has())[0] == 10**18 - int(used["cost"])


async def test_a_key_of_another_wallet_spends_nothing_of_this_one(bank: Bank) -> None:
    key = await bank.key(BOB)
    await bank.pay_in(10**18, ALICE)
    assert (await bank.send("POST", "/v1/chat/completions", key=key, json=BODY)).status_code == 402
    assert await bank.has(ALICE) == (10**18, 0)
    refused = await bank.send("GET", f"/balance?user_pubkey={ALICE.address}", key=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "wrong_wallet")


async def test_pricing(bank: Bank) -> None:
    pricing = (await bank.send("GET", "/v1/pricing")).json()
    assert pricing["price_per_token_layer"] == PRICE
    assert pricing["currency"] == {"symbol": "HYPE", "unit": "wei", "decimals": 18}
    assert pricing["models"] == [{"id": MODEL_ID, "layers": LAYERS, "price_per_token": PRICE * LAYERS}]
    assert pricing["deposit"]["address"] == PLATFORM
    key = await bank.key()
    preview = (await bank.send("POST", "/v1/pricing", key=key, json=BODY)).json()
    assert preview["token_layers"] == (preview["prompt_tokens"] + 40 - 1) * LAYERS
    assert int(preview["cost"]) == preview["token_layers"] * PRICE
    too_long = await bank.send("POST", "/v1/pricing", key=key, json={**BODY, "max_tokens": CONTEXT})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    assert bank.twin.requests == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "missing_required_parameter"),
        ({"tx_sig": "0x12"}, 400, "missing_required_parameter"),
        ({"tx_sig": 5, "user_pubkey": ALICE.address}, 400, "invalid_type"),
        ({"tx_sig": "0x12", "user_pubkey": ALICE.address, "amount": 5}, 400, "unknown_parameter"),
        ({"tx_sig": "0x12", "user_pubkey": ALICE.address}, 400, "bad_txid"),
        ({"tx_sig": "0x" + "1" * 64, "user_pubkey": "0x12"}, 400, "bad_address"),
    ],
)
async def test_a_claim_that_credits_nothing(bank: Bank, body: dict[str, Any], status: int, code: str) -> None:
    response = await bank.send("POST", "/deposit", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert await bank.has() == (0, 0)


@pytest.mark.parametrize("query", ["since=-1", "since=x", "limit=0", "limit=1001", "limit=1e3", "since=9" + "9" * 400])
async def test_usage_of_bad_times(bank: Bank, query: str) -> None:
    response = await bank.send("GET", f"/usage?{query}", key=await bank.key())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")
