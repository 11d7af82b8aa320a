"""Jobs that nobody waits for on the line: taken, paid for, kept for a while, and for their owner alone."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from azu.errors import NetworkError
from tests.coordinator.api.paying import ALICE, BOB, OTHER, PRICE, Bank, cost, open_bank
from tests.coordinator.api.twin import LAYERS, MODEL_ID, Twin

JOB: dict[str, Any] = {"model_id": MODEL_ID, "prompt": "What is the capital of France?", "est_tokens": 40}


@pytest.fixture
async def bank(twin: Twin, tmp_path: Path, empty_ledger: Path) -> AsyncIterator[Bank]:
    twin.price = PRICE
    async with open_bank(twin, tmp_path, empty_ledger) as made:
        yield made
        assert await made.ledger.verify() == []


async def submitted(bank: Bank, key: str, **changes: Any) -> str:
    response = await bank.send("POST", "/submit", key=key, json={**JOB, **changes})
    assert response.status_code == 202, response.text
    job_id: str = response.json()["job_id"]
    return job_id


async def result_of(bank: Bank, key: str, job_id: str) -> dict[str, Any]:
    """What became of a job, once it has ended."""
    with trio.fail_after(20):
        while True:
            response = await bank.send("GET", f"/results/{job_id}", key=key)
            assert response.status_code == 200, response.text
            result: dict[str, Any] = response.json()
            if result["status"] in ("done", "failed"):
                return result
            await trio.sleep(0.02)


async def test_an_answer_is_fetched_later(bank: Bank) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    job_id = await submitted(bank, key, user_pubkey=ALICE.address.lower())
    result = await result_of(bank, key, job_id)
    assert (result["result"], result["finish_reason"], result["error"]) == (bank.twin.answer, "stop", None)
    positions = result["usage"]["total_tokens"] - 1
    assert int(result["usage"]["azu"]["cost"]) == cost(positions)
    assert result["usage"]["azu"]["token_layers"] == positions * LAYERS
    assert result["kept_until"] >= time.time() + 3500
    assert bank.twin.requests[0].max_tokens == 40
    with trio.fail_after(20):
        while (await bank.has())[1]:
            await trio.sleep(0.02)
    assert await bank.has() == (10**18 - cost(positions), 0)
    (use,) = (await bank.send("GET", "/usage", key=key)).json()["data"]
    assert use["job_id"] == job_id


async def test_it_is_put_aside_before_it_is_taken(bank: Bank) -> None:
    key = await bank.key()
    bank.twin.stall_after = 3
    response = await bank.send("POST", "/submit", key=key, json=JOB)
    assert (response.status_code, response.json()["error"]["code"]) == (402, "insufficient_funds")
    assert bank.twin.requests == []
    needed = int(response.json()["error"]["azu"]["required"])
    await bank.pay_in(needed)
    job_id = await submitted(bank, key)
    assert await bank.has() == (0, needed)
    with trio.fail_after(20):
        await bank.twin.stalled.wait()
    response = await bank.send("GET", f"/results/{job_id}", key=key)
    assert (response.json()["status"], response.json()["result"]) == ("running", None)


async def test_results_are_their_owners(bank: Bank) -> None:
    key, other = await bank.key(), await bank.key(BOB)
    await bank.pay_in(10**18)
    job_id = await submitted(bank, key)
    await result_of(bank, key, job_id)
    for asked, with_key in ((job_id, other), ("0" * 32, key), ("x" * 3000, key)):
        response = await bank.send("GET", f"/results/{asked}", key=with_key)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")


async def test_a_job_that_fails_says_why(bank: Bank) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    bank.twin.failure = NetworkError("the line broke", remedy="Send it again")
    result = await result_of(bank, key, await submitted(bank, key))
    assert (result["status"], result["result"]) == ("failed", None)
    assert (result["error"]["code"], result["error"]["message"]) == ("unreachable", "the line broke. Send it again")
    with trio.fail_after(20):
        while await bank.has() != (10**18, 0):
            await trio.sleep(0.02)


async def test_a_result_waits_for_a_database_that_is_away(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("coordinator.api.submit._AGAIN_S", 0.05)
    key = await bank.key()
    await bank.pay_in(10**18)
    away = """CREATE TRIGGER away BEFORE UPDATE ON submitted WHEN NEW.ended_at IS NOT NULL
        BEGIN SELECT RAISE(ABORT, 'away'); END"""
    await bank.ledger.write(lambda connection: connection.exec_driver_sql(away))
    job_id = await submitted(bank, key)
    with trio.fail_after(20):
        while [record.message for record in caplog.records].count("result not kept yet") < 2:
            await trio.sleep(0.02)
    await bank.ledger.write(lambda connection: connection.exec_driver_sql("DROP TRIGGER away"))
    assert (await result_of(bank, key, job_id))["result"] == bank.twin.answer
    await bank.until_none_is_kept()


async def test_a_wallet_has_so_many_jobs_at_most(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.accounts.submitted.MAX_OF_ACCOUNT", 2)
    key = await bank.key()
    await bank.pay_in(10**18)
    first = await submitted(bank, key)
    await result_of(bank, key, first)
    bank.twin.stall_after = 1
    await submitted(bank, key)
    await submitted(bank, key)  # in place of the first, which is done
    assert (await bank.send("GET", f"/results/{first}", key=key)).status_code == 404
    response = await bank.send("POST", "/submit", key=key, json=JOB)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_jobs")
    assert "Retry-After" in response.headers


async def test_results_are_kept_within_time_and_size(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = await bank.key(), await bank.key(BOB)
    await bank.pay_in(10**18)
    await bank.pay_in(10**18, BOB, number=2)
    jobs = [await submitted(bank, with_key) for with_key in (key, other)]
    for job_id, with_key in zip(jobs, (key, other), strict=True):
        result = await result_of(bank, with_key, job_id)
    size = len(json.dumps({name: result[name] for name in ("result", "finish_reason", "usage", "error")}))
    monkeypatch.setattr("azu.accounts.submitted.MAX_CHARS", 2 * size + size // 2)
    await result_of(bank, key, await submitted(bank, key))
    kept = [
        await bank.send("GET", f"/results/{jobs[0]}", key=key),
        await bank.send("GET", f"/results/{jobs[1]}", key=other),
    ]
    assert sorted(response.status_code for response in kept) == [200, 404]
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3_700)
    assert (await bank.send("GET", f"/results/{jobs[1]}", key=other)).status_code == 404


async def test_bad_bodies(bank: Bank) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt": None}, 400, "missing_required_parameter"),
        ({"prompt": ""}, 400, "invalid_value"),
        ({"model_id": "nope"}, 404, "model_not_found"),
        ({"est_tokens": 0}, 400, "invalid_value"),
        ({"est_tokens": -5}, 400, "invalid_value"),
        ({"est_tokens": 1.5}, 400, "invalid_type"),
        ({"est_tokens": "40"}, 400, "invalid_type"),
        ({"est_tokens": True}, 400, "invalid_type"),
        ({"est_tokens": 10**30}, 400, "context_length_exceeded"),
        ({"user_pubkey": BOB.address}, 403, "wrong_wallet"),
        ({"user_pubkey": "0x12"}, 403, "wrong_wallet"),
        ({"price": 0}, 400, "unknown_parameter"),
    ]
    for changes, status, code in cases:
        response = await bank.send("POST", "/submit", key=key, json={**JOB, **changes})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), changes
    assert bank.twin.requests == []
    assert await bank.has() == (10**18, 0)


async def test_another_coordinator_knows_what_became_of_it(bank: Bank, twin: Twin, tmp_path: Path) -> None:
    """The same, and one whose coordinator restarts while it runs: it goes on."""
    key = await bank.key()
    await bank.pay_in(10**18)
    done = await submitted(bank, key)
    expected = await result_of(bank, key, done)
    twin.stall_after = 1
    running = await submitted(bank, key)
    await twin.stalled.wait()
    async with open_bank(twin, tmp_path, tmp_path, is_new=False, owner=OTHER) as other:
        assert await result_of(other, key, done) == expected
        assert (await other.send("GET", f"/results/{running}", key=key)).json()["status"] == "running"
    twin.stall_after = None
    async with open_bank(twin, tmp_path, tmp_path, is_new=False) as again:
        result = await result_of(again, key, running)
        assert (result["status"], result["result"]) == ("done", twin.answer)
        assert [ticket.job_id.hex() for ticket in twin.taken_up] == [running]
        await again.until_none_is_kept()
        assert await again.has() == (10**18 - 2 * cost(result["usage"]["total_tokens"] - 1), 0)


@pytest.mark.parametrize(("begun", "forgotten"), [(True, False), (False, False), (True, True)])
async def test_a_submitted_job_outlives_a_restart(
    twin: Twin, tmp_path: Path, empty_ledger: Path, begun: bool, forgotten: bool
) -> None:
    """In its middle, before its first token, and where its workers have let go of it."""
    twin.price, stop = PRICE, trio.Event()
    twin.stall_after, twin.begins, twin.forgets = 3, begun, forgotten
    async with open_bank(twin, tmp_path, empty_ledger, stop=stop) as bank:
        key = await bank.key()
        await bank.pay_in(10**18)
        job_id = await submitted(bank, key)
        while not (twin.stalled.is_set() if begun else twin.entered):
            await trio.sleep(0.02)
        stop.set()
    twin.stall_after, twin.begins = None, True
    async with open_bank(twin, tmp_path, empty_ledger, is_new=False) as bank:
        result = await result_of(bank, key, job_id)
        assert (result["result"], result["error"]) == (twin.answer, None)
        await bank.until_none_is_kept()
        assert await bank.has() == (10**18 - cost(result["usage"]["total_tokens"] - 1), 0)
        assert await bank.ledger.verify() == []


async def test_one_that_nobody_can_go_on_with_says_so(bank: Bank, twin: Twin, tmp_path: Path) -> None:
    key = await bank.key()
    await bank.pay_in(10**18)
    twin.stall_after = 3
    job_id = await submitted(bank, key)
    await twin.stalled.wait()
    twin.refusal = NetworkError("the workers that knew its tokens are lost", code="tokens_lost")
    async with open_bank(twin, tmp_path, tmp_path, is_new=False) as again:
        result = await result_of(again, key, job_id)
        assert (result["status"], result["error"]["code"]) == ("failed", "tokens_lost")
        await again.until_none_is_kept()
        assert await again.has() == (10**18, 0)
