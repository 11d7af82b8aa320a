"""Who is let in without a key: anybody where use is free, and wallets at their word on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from azu.errors import InputError
from coordinator.api.auth import auth_mode
from tests.coordinator.api.paying import ALICE, BOB, PRICE, open_bank
from tests.coordinator.api.twin import MODEL_ID, Twin

BODY: dict[str, Any] = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}


@pytest.mark.parametrize(
    ("asked", "provider", "host", "mode"),
    [
        (None, "hyperliquid", "0.0.0.0", "keys"),
        (None, "none", "0.0.0.0", "free"),
        ("keys", "none", "0.0.0.0", "keys"),
        ("open", "hyperliquid", "127.0.0.1", "open"),
        ("open", "solana", "::1", "open"),
        ("open", "solana", "localhost", "open"),
        ("open", "none", "127.0.0.8", "free"),
    ],
)
def test_modes(asked: Any, provider: str, host: str, mode: str) -> None:
    public_url = None if host != "0.0.0.0" else "https://azu.example.org"
    assert auth_mode(asked, provider, host, public_url) == mode


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "azu.example.org", ""])
def test_open_mode_is_for_loopback(host: str) -> None:
    with pytest.raises(InputError) as caught:
        auth_mode("open", "hyperliquid", host, None)
    assert caught.value.code == "open_mode_exposed"


def test_wallets_have_to_see_where_they_sign_in() -> None:
    with pytest.raises(InputError) as caught:
        auth_mode(None, "hyperliquid", "0.0.0.0", None)
    assert caught.value.code == "public_url_missing"


async def test_open_mode_takes_a_wallet_at_its_word(twin: Twin, tmp_path: Path, empty_ledger: Path) -> None:
    twin.price = PRICE
    async with open_bank(twin, tmp_path, empty_ledger, mode="open") as bank:
        await bank.pay_in(10**18)
        for options in (
            {"key": ALICE.address},
            {"key": ALICE.address.lower()},
        ):
            assert (await bank.send("POST", "/v1/chat/completions", json=BODY, **options)).status_code == 200
        assert (await bank.has())[0] < 10**18
        by_query = await bank.send("GET", f"/balance?user_pubkey={ALICE.address}")
        assert by_query.json()["wallet"] == ALICE.address
        job = {"model_id": MODEL_ID, "prompt": "Hello", "est_tokens": 5, "user_pubkey": ALICE.address}
        assert (await bank.send("POST", "/submit", json=job)).status_code == 202
        assert (await bank.send("POST", "/submit", json=job, key=BOB.address)).status_code == 403
        poor = await bank.send("POST", "/v1/chat/completions", json=BODY, key=BOB.address)
        assert poor.status_code == 402
        for key in ("", "none", "azu-123"):
            nobody = await bank.send("POST", "/v1/chat/completions", json=BODY, key=key)
            assert nobody.status_code == 401, key


@pytest.mark.parametrize(
    "headers",
    [{"X-Forwarded-For": "203.0.113.7"}, {"Forwarded": "for=203.0.113.7"}, {"Host": "evil.example"}, {"Host": "[::2]"}],
)
async def test_open_mode_answers_this_machine_only(
    twin: Twin, tmp_path: Path, empty_ledger: Path, headers: dict[str, str]
) -> None:
    async with open_bank(twin, tmp_path, empty_ledger, mode="open") as bank:
        await bank.pay_in(10**18)
        for method, path in (("GET", "/balance"), ("POST", "/v1/chat/completions"), ("POST", "/submit")):
            refused = await bank.send(
                method, path, key=ALICE.address, headers=headers, json=BODY if method == "POST" else None
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "loopback_only")
        assert twin.requests == []


async def test_without_money_use_is_free_and_counted(twin: Twin, tmp_path: Path, empty_ledger: Path) -> None:
    async with open_bank(twin, tmp_path, empty_ledger, mode="free", name="none") as bank:
        answer = await bank.send("POST", "/v1/chat/completions", json=BODY, key="none")
        spent = answer.json()["usage"]["azu"]["cost"]
        assert answer.status_code == 200
        assert spent > 0
        assert await bank.ledger.balance("free") == -spent
        balance = (await bank.send("GET", "/balance")).json()
        assert (balance["free"], balance["wallet"], balance["deposit"]) == (True, None, None)
        job = {"model_id": MODEL_ID, "prompt": "Hello", "user_pubkey": "anybody"}
        assert (await bank.send("POST", "/submit", json=job)).status_code == 202
        refused = await bank.send("POST", "/deposit", json={"tx_sig": "x", "user_pubkey": "y"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_payments")
        assert (await bank.send("GET", "/usage")).json()["data"] == [], "it would be everybody's"


async def test_a_private_swarm_may_ask_for_keys_all_the_same(twin: Twin, tmp_path: Path, empty_ledger: Path) -> None:
    async with open_bank(twin, tmp_path, empty_ledger, mode="keys", name="none") as bank:
        assert (await bank.send("POST", "/v1/chat/completions", json=BODY)).status_code == 401
        key = await bank.key()
        answer = await bank.send("POST", "/v1/chat/completions", json=BODY, key=key)
        assert answer.status_code == 200, answer.text
        (use,) = (await bank.send("GET", "/usage", key=key)).json()["data"]
        assert (use["cost"], use["key_id"]) == (answer.json()["usage"]["azu"]["cost"], key.split("-")[1])
