"""Streams that outlive their coordinator: nothing comes twice, nothing is missing, and it is paid for once."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
from sqlalchemy import insert, select, update

from azu.ledger import Ledger, schema
from coordinator.api.place import parse_place
from coordinator.api.settings import ApiSettings
from coordinator.chat import ChatFormat
from coordinator.generation import ServedModel
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.paying import (
    ALICE,
    BOB,
    OTHER,
    OWNER,
    PRICE,
    Bank,
    EvmWallet,
    cost,
    open_bank,
    write_locked,
)
from tests.coordinator.api.twin import MODEL_ID, Twin

MONEY = 10**18
BODY = {
    "model": MODEL_ID,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 40,
    "stream": True,
    "stream_options": {"include_usage": True},
}

PLAIN: dict[str, Any] = {"stream_options": None}


def events_of(text: str) -> list[tuple[str, Any]]:
    """The id and the data of each event."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append(
                (fields.get("id", ""), fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"]))
            )
    return found


def text_of(events: list[tuple[str, Any]], index: int = 0) -> str:
    choices = [choice for _, data in events if isinstance(data, dict) for choice in data.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)


class House:
    """A coordinator that can be started again on what it has on disk."""

    def __init__(self, twin: Twin, folder: Path, template: Path) -> None:
        self.twin, self.folder, self.template = twin, folder, template
        self.lives = 0

    @asynccontextmanager
    async def life(self, stop: trio.Event | None = None, **options: Any) -> AsyncIterator[Bank]:
        self.lives += 1
        is_new = self.lives == 1
        opened = open_bank(
            self.twin,
            self.folder,
            self.template,
            mode="open",
            is_new=is_new,
            stop=trio.Event() if stop is None else stop,
            **options,
        )
        async with opened as bank:
            if is_new:
                await bank.pay_in(MONEY)
            yield bank

    async def interrupted(self, **changes: Any) -> list[tuple[str, Any]]:
        """The events of a stream whose coordinator is stopped after five tokens."""
        self.twin.stall_after, self.twin.stalled = 5, trio.Event()
        stop, answers = trio.Event(), list[str]()
        async with self.life(stop) as bank, trio.open_nursery() as nursery:

            async def read() -> None:
                answers.append((await self.ask(bank, **changes)).text)

            nursery.start_soon(read)
            await self.twin.stalled.wait()
            await trio.sleep(0.1)  # what was sampled leaves
            stop.set()
        self.twin.stall_after = None
        return events_of(answers[0])

    async def ask(self, bank: Bank, last: str = "", wallet: EvmWallet = ALICE, **changes: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {wallet.address}"} | ({"Last-Event-ID": last} if last else {})
        post = partial(httpx.post, f"{bank.url}/v1/chat/completions", json=BODY | changes, headers=headers, timeout=30)
        return await in_thread(post)


@pytest.fixture
async def house(twin: Twin, tmp_path: Path, empty_ledger: Path) -> House:
    twin.price = PRICE
    return House(twin, tmp_path, empty_ledger)


def last_of(events: list[tuple[str, Any]]) -> str:
    return [each for each, _ in events if each][-1]


async def test_the_official_client_reads_over_ids_and_comments(house: House) -> None:
    house.twin.pause_s, house.twin.answer = 0.12, "Hello"
    async with house.life(api=ApiSettings(keep_alive_s=0.05)) as bank:
        asked = await house.ask(bank)
        assert ": keep-alive" in asked.text
        assert last_of(events_of(asked.text.replace(": keep-alive\n", "")))
        client = openai.OpenAI(base_url=f"{bank.url}/v1", api_key=ALICE.address, max_retries=0, timeout=30)
        chunks: Any = await in_thread(lambda: list(client.chat.completions.create(**BODY)))  # type: ignore[call-overload]
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "Hello"


async def test_a_stream_goes_on_after_a_restart(house: House) -> None:
    before = await house.interrupted()
    assert before[-1][1]["error"]["code"] == "restarting"
    async with house.life() as bank:
        aside = (await bank.has())[1]
        assert aside > 0
        after = events_of((await house.ask(bank, last_of(before))).text)
        assert text_of(before)
        assert text_of(before) + text_of(after) == house.twin.answer
        assert [data for _, data in after if isinstance(data, dict) and data.get("error")] == []
        assert after[-1][1] == "[DONE]"
        usage = after[-2][1]["usage"]
        assert {(data["id"], data["created"]) for _, data in before[:-1]} == {
            (data["id"], data["created"]) for _, data in after[:-1]
        }
        spent = cost(usage["prompt_tokens"] + usage["completion_tokens"] - 1)
        assert await bank.has() == (MONEY - spent, 0)
        assert await bank.ledger.verify() == []
        gone = await house.ask(bank, last_of(before))
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "stream_not_found")
        await bank.until_none_is_kept()


async def test_it_goes_on_from_any_of_its_events_and_after_a_second_restart(house: House) -> None:
    before = await house.interrupted()
    house.twin.stall_after, house.twin.stalled = 6, trio.Event()
    stop, texts = trio.Event(), list[str]()
    async with house.life(stop) as bank, trio.open_nursery() as nursery:

        async def read() -> None:
            texts.append((await house.ask(bank, before[1][0])).text)

        nursery.start_soon(read)
        await house.twin.stalled.wait()
        await trio.sleep(0.1)
        stop.set()
    house.twin.stall_after = None
    between = events_of(texts[0])
    async with house.life() as bank:
        after = events_of((await house.ask(bank, last_of(between))).text)
    assert text_of(before[:2]) + text_of(between) + text_of(after) == house.twin.answer


async def test_what_nobody_claims_is_ended_and_paid_as_far_as_it_came(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.interrupted()
    monkeypatch.setattr("coordinator.api.kept.CLAIM_S", 0.05)
    async with house.life() as bank:
        with trio.fail_after(20):
            while (await bank.has())[1]:
                await trio.sleep(0.02)
        prompt = len(house.twin.requests[0].prompt)
        assert await bank.has() == (MONEY - cost(prompt + 5 - 1), 0)
        assert await bank.ledger.verify() == []
        await bank.until_none_is_kept()


async def hang_up(house: House, bank: Bank, last: str = "") -> None:
    """Ask for a stream, and hang up before it comes."""
    headers = {"Authorization": f"Bearer {ALICE.address}"} | ({"Last-Event-ID": last} if last else {})
    post = partial(httpx.post, f"{bank.url}/v1/chat/completions", json=BODY, headers=headers, timeout=1)
    with pytest.raises(httpx.ReadTimeout):
        await in_thread(post)
    await trio.sleep(0.3)  # until the coordinator has noticed


async def test_who_hangs_up_as_the_stream_is_noted_leaves_nothing(house: House) -> None:
    async with house.life() as bank:
        reserve = bank.ledger.reserve

        async def reserve_and_lock(*args: Any, **options: Any) -> Any:
            reserved = await reserve(*args, **options)
            locked.set()
            await go_on.wait()
            return reserved

        locked, go_on = trio.Event(), trio.Event()
        bank.ledger.reserve = reserve_and_lock  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up, house, bank)
            await locked.wait()
            async with write_locked(house.folder / "ledger.sqlite3"):
                go_on.set()
                await trio.sleep(2)
        await bank.ledger.write(lambda _: None)  # after what had waited
        await bank.until_none_is_kept()
        with trio.fail_after(20):
            while (await bank.has())[1]:
                await trio.sleep(0.02)


@pytest.mark.parametrize("is_slow", ["to load", "to be claimed"])
async def test_who_comes_back_and_hangs_up_may_come_again(
    house: House, monkeypatch: pytest.MonkeyPatch, is_slow: str
) -> None:
    before = await house.interrupted()
    async with house.life() as bank:
        if is_slow == "to load":

            def load(model: ServedModel) -> ChatFormat:
                time.sleep(1.5)
                return ChatFormat(model)

            with monkeypatch.context() as patch:
                patch.setattr("coordinator.api.completions.ChatFormat", load)
                await hang_up(house, bank, last_of(before))
        else:
            async with write_locked(house.folder / "ledger.sqlite3"):
                await hang_up(house, bank, last_of(before))
        with trio.fail_after(20):
            while (after := await house.ask(bank, last_of(before))).status_code == 409:
                await trio.sleep(0.1)
        assert text_of(before) + text_of(events_of(after.text)) == house.twin.answer
        await bank.until_none_is_kept()


async def test_a_stream_is_its_own_wallets(house: House) -> None:
    before = await house.interrupted()
    place = parse_place(last_of(before))
    async with house.life() as bank:
        for last, wallet, status, code in (
            (str(place), BOB, 404, "stream_not_found"),
            (f"{'0' * 32}-1-00000000", ALICE, 404, "stream_not_found"),
            ("nonsense", ALICE, 400, "invalid_last_event_id"),
            (f"{place}0", ALICE, 400, "invalid_last_event_id"),
        ):
            refused = await house.ask(bank, last, wallet)
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert text_of(before) + text_of(events_of((await house.ask(bank, str(place))).text)) == house.twin.answer


@pytest.mark.parametrize("changed", ["Another capital of France is Lyon.", "T"])
async def test_a_text_that_comes_out_differently_does_not_go_on(house: House, changed: str) -> None:
    before = await house.interrupted()
    house.twin.answer = changed
    async with house.life() as bank:
        after = events_of((await house.ask(bank, last_of(before))).text)
        assert [data["error"]["code"] for _, data in after] == ["stream_changed"]


async def test_each_choice_goes_on(house: House) -> None:
    """One is complete, one in its middle, and one has not begun when the coordinator stops."""
    house.twin.stalling, house.twin.unbegun = 11, 12
    before = await house.interrupted(n=3, seed=10)
    assert before[-1][1]["error"]["code"] == "restarting"
    assert len([each for each, _ in before if each]) == len({each for each, _ in before if each})
    house.twin.unbegun = None
    async with house.life() as bank:
        after = events_of((await house.ask(bank, last_of(before))).text)
        for index in range(3):
            assert text_of(before, index) + text_of(after, index) == house.twin.answer
        ends = [choice for _, data in (*before, *after) if isinstance(data, dict) for choice in data.get("choices", ())]
        assert sorted(each["index"] for each in ends if each["finish_reason"] == "stop") == [0, 1, 2]
        assert after[-1][1] == "[DONE]"
        assert [ticket.sampling.seed for ticket in house.twin.taken_up] == [11]
        chains = [each.first_chain for each in house.twin.requests if each.sampling.seed == 12]
        assert chains[0] < chains[1], "a worker takes no job's id twice"
        prompt, tokens = len(house.twin.requests[0].prompt), after[-2][1]["usage"]["completion_tokens"]
        spent = cost(3 * (prompt - 1) + tokens)
        assert await bank.has() == (MONEY - spent, 0)
        assert await bank.ledger.verify() == []
        await bank.until_none_is_kept()


async def test_choices_that_nobody_claims_are_paid_as_far_as_they_came(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.twin.stalling, house.twin.unbegun = 11, 12
    before = await house.interrupted(n=3, seed=10)
    monkeypatch.setattr("coordinator.api.kept.CLAIM_S", 0.05)
    async with house.life() as bank:
        await bank.until_none_is_kept()
        spent = MONEY - (await bank.has())[0]
        prompt, whole = (
            len(house.twin.requests[0].prompt),
            (await house.ask(bank, stream=False, **PLAIN)).json()["usage"],
        )
        assert spent == cost(prompt + whole["completion_tokens"] - 1) + cost(prompt + 5 - 1)
        assert (await bank.has())[1] == 0
        assert await bank.ledger.verify() == []
        assert (await house.ask(bank, last_of(before))).status_code == 404


async def test_a_stream_goes_on_at_another_coordinator(house: House) -> None:
    house.twin.successors = (OTHER,)
    before = await house.interrupted(n=2)
    async with house.life(owner=OTHER) as bank:
        refused = await house.ask(bank, last_of(before), BOB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "stream_not_found")
        after = events_of((await house.ask(bank, last_of(before))).text)
        for index in range(2):
            assert text_of(before, index) + text_of(after, index) == house.twin.answer
        usage = after[-2][1]["usage"]
        spent = cost(2 * (usage["prompt_tokens"] - 1) + usage["completion_tokens"])
        assert await bank.has() == (MONEY - spent, 0)
        assert await bank.ledger.verify() == []
        await bank.until_none_is_kept()


async def test_only_one_that_was_named_goes_on_with_it(house: House) -> None:
    before = await house.interrupted()
    async with house.life(owner=OTHER) as bank:
        for _ in range(2):
            refused = await house.ask(bank, last_of(before))
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "stream_elsewhere")
    async with house.life() as bank:
        after = events_of((await house.ask(bank, last_of(before))).text)
        assert text_of(before) + text_of(after) == house.twin.answer


async def test_one_whose_coordinator_died_is_waited_for_until_that_is_known(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.twin.successors = (OTHER,)
    before = await house.interrupted()
    monkeypatch.setattr("azu.accounts.presence.BEAT_S", 0.05)
    monkeypatch.setattr("azu.accounts.presence.LEASE_S", 0.5)
    async with Ledger.open(house.folder / "ledger.sqlite3", currency="wei") as ledger:
        await ledger.write(lambda connection: connection.execute(update(schema.kept).values(leader=OWNER)))
        row = {"peer_id": OWNER, "beat": 7, "url": ""}
        await ledger.write(lambda connection: connection.execute(insert(schema.coordinators), row))
    async with house.life(owner=OTHER) as bank:
        after = events_of((await house.ask(bank, last_of(before))).text)
        assert text_of(before) + text_of(after) == house.twin.answer
        await bank.until_none_is_kept()
        assert (await bank.has())[1] == 0


async def test_one_whose_coordinator_lives_is_to_be_had_there(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.accounts.presence.BEAT_S", 0.05)
    house.twin.stall_after = 5
    async with house.life() as bank, trio.open_nursery() as nursery:
        nursery.start_soon(house.ask, bank)
        await house.twin.stalled.wait()
        query = select(schema.kept.c.request_id)
        stream = await bank.ledger.read(lambda connection: connection.execute(query).scalar_one())
        async with house.life(owner=OTHER) as other:
            for asked in (other, bank):
                refused = await house.ask(asked, f"{stream}-1-00000000")
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (409, "stream_elsewhere")
                assert error["azu"] == {"coordinator": OWNER, "url": bank.url}
        nursery.cancel_scope.cancel()
