"""Two coordinators on one database and one swarm, and streams of one that is killed or stopped, as real processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import pytest
import torch
import transformers
import trio

from azu.distribution import Library
from azu.ledger import Ledger
from coordinator.placement import shape_of
from tests.coordinator.api.paying import ALICE, PLATFORM
from tests.coordinator.api.twin import byte_level_tokenizer, served_model
from tests.ledger.postgres import binaries, running
from tests.local_swarm import LocalSwarm, Program, wait_until

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

MONEY = 10**18
KV_TOKENS = 8192
STOP = 2  # ChatML's end of a turn
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def chat_model(folder: Path) -> str:
    """A random Llama that never stops by itself, with a tokenizer and a chat template."""
    served_model(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=byte_level_tokenizer().get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=STOP,
        initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    model.lm_head.weight.data[STOP] = 0.0  # others are above this
    model.save_pretrained(folder)
    return str(folder)


class Pair(LocalSwarm):
    """Two coordinators, `coordinator` and `other`, with two workers that have half of the model each."""

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.other, self.other_url = self.start_coordinator("other")
            peers = [each.found("coordinator starting")[0]["peer"] for each in (self.coordinator, self.other)]
            for half in ((0, 2), (2, 4)):
                self.add_worker(self._memory(*half), *(word for peer in peers for word in ("--trust", peer)))
            wait_until(lambda: self.is_covered(self.url) and self.is_covered(self.other_url), "coverage")
        except BaseException:
            self._stop()
            raise
        return self

    def _memory(self, start: int, end: int) -> str:
        """What these layers take, and no more."""
        manifest = dict(Library(self.folder / "coordinator").manifests())[self.manifest]
        return f"{-(-shape_of(manifest, 'float32', KV_TOKENS).stage_bytes(start, end) // 1024)}KiB"

    def is_covered(self, url: str) -> bool:
        return httpx.get(f"{url}/healthz").status_code == 200


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    tools = binaries()
    if tools is None:
        pytest.skip("POSTGRESQL IS NOT TESTED: install it (Debian: apt-get install postgresql)")
    with running(tools) as server:
        yield server.url()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    options = ("--payment-provider", "hyperliquid", "--hyperliquid-rpc-url", "http://127.0.0.1:9")
    options += ("--hyperliquid-address", PLATFORM, "--public-url", "https://azu.test", "--ledger-url", database)
    with Pair(folder, model=chat_model(folder / "tiny"), kv_tokens=KV_TOKENS, options=options) as pair:
        yield pair


@pytest.fixture(scope="module")
def key(swarm: Pair, database: str) -> str:
    """Made with a challenge of one coordinator at the other, for a wallet that has paid in."""

    async def pay_in() -> None:
        async with Ledger.open(database, currency="wei") as ledger:
            await ledger.deposit("hyperliquid", "eip155:999", "0x1", ALICE.address, MONEY)

    trio.run(pay_in)
    asked = httpx.post(f"{swarm.url}/auth/challenge", json={"address": ALICE.address})
    message = asked.json()["message"]
    made = httpx.post(f"{swarm.other_url}/auth/keys", json={"message": message, "signature": ALICE.sign(message)})
    return str(made.json()["key"])


class Client:
    """What a client that goes on with streams knows of one."""

    def __init__(self, swarm: Pair, key: str, tokens: int, choices: int = 1) -> None:
        self.texts = [""] * choices
        self.last = ""
        self.end: Any = None  # usage or an error
        self._body = {"model": swarm.model_id, "messages": QUESTION, "temperature": 0, "max_tokens": tokens}
        self._body |= {"n": choices, "stream": True, "stream_options": {"include_usage": True}}
        self._headers = {"Authorization": f"Bearer {key}"}

    def read(self, url: str, after: int = -1, then: Callable[[], object] = lambda: None) -> Client:
        """Read on, and do something after so many events, until the stream ends or breaks."""
        headers = self._headers | ({"Last-Event-ID": self.last} if self.last else {})
        post = httpx.stream("POST", f"{url}/v1/chat/completions", json=self._body, headers=headers, timeout=240)
        event: dict[str, str] = {}
        try:
            with post as response:
                for line in response.iter_lines():
                    if line:
                        name, _, value = line.partition(": ")
                        event[name] = value
                        continue
                    self._take(event)
                    event = {}
                    after -= 1
                    if after == 0:
                        then()
        except httpx.TransportError:
            return self  # it was killed
        return self

    def refused(self, url: str) -> Any:
        """Why a coordinator does not go on with it."""
        headers = self._headers | {"Last-Event-ID": self.last}
        return httpx.post(f"{url}/v1/chat/completions", json=self._body, headers=headers, timeout=60).json()["error"]

    def _take(self, event: dict[str, str]) -> None:
        self.last = event.get("id", self.last)
        if event.get("data", "[DONE]") != "[DONE]":
            data = json.loads(event["data"])
            for each in data.get("choices", ()):
                self.texts[each["index"]] += each["delta"].get("content") or ""
            self.end = data.get("usage") or data.get("error") or self.end


def whole(swarm: Pair, url: str, key: str, tokens: int) -> Any:
    body = {"model": swarm.model_id, "messages": QUESTION, "temperature": 0, "max_tokens": tokens}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=240).json()


def money(url: str, key: str) -> tuple[int, int]:
    """What the key's wallet may spend, and what is put aside."""
    found = httpx.get(f"{url}/balance", headers={"Authorization": f"Bearer {key}"}).json()
    return int(found["available"]), int(found["reserved"])


def test_one_account_and_one_swarm_for_both(swarm: Pair, key: str) -> None:
    before, _ = money(swarm.url, key)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda url: whole(swarm, url, key, 40), [swarm.url, swarm.other_url] * 2))
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    spent = sum(int(answer["usage"]["azu"]["cost"]) for answer in answers)
    assert spent > 0
    assert money(swarm.url, key) == money(swarm.other_url, key) == (before - spent, 0)
    used = httpx.get(f"{swarm.other_url}/usage", headers={"Authorization": f"Bearer {key}"}).json()["data"]
    assert sum(int(each["cost"]) for each in used) == spent


def once(swarm: Pair, key: str, tokens: int, name: str) -> Any:
    """What the official client gets with a key of its own, however often it has to ask."""
    client = openai.OpenAI(base_url=f"{swarm.url}/v1", api_key=key, max_retries=20, timeout=240)
    create: Any = client.chat.completions.create
    headers = {"Idempotency-Key": name}
    return create(model=swarm.model_id, messages=QUESTION, temperature=0, max_tokens=tokens, extra_headers=headers)


def submit(swarm: Pair, key: str, tokens: int) -> str:
    body = {"model_id": swarm.model_id, "prompt": QUESTION[0]["content"], "est_tokens": tokens}
    asked = httpx.post(f"{swarm.url}/submit", json=body, headers={"Authorization": f"Bearer {key}"})
    return str(asked.json()["job_id"])


def result(url: str, key: str, job_id: str) -> Any:
    """What a submitted job has come to."""
    return httpx.get(f"{url}/results/{job_id}", headers={"Authorization": f"Bearer {key}"}).json()


@pytest.mark.parametrize("end", [Program.kill, Program.stop])
def test_answers_outlive_their_coordinator(swarm: Pair, key: str, end: Callable[[Program], object]) -> None:
    """Streams, a submitted job, and an answer that its client has named: at the other coordinator after a kill, and at
    the same one after a restart. The other's streams only notice a worker that is stopped meanwhile, so that no answer
    is complete.
    """
    wait_until(lambda: swarm.is_covered(swarm.url), "coverage after a restart")
    before, _ = money(swarm.other_url, key)
    tokens, refusals = 400, list[Any]()

    def interrupt() -> None:
        worker = swarm.workers[0].process
        worker.send_signal(signal.SIGSTOP)
        refusals.append(client.refused(swarm.other_url))
        end(swarm.coordinator)
        worker.send_signal(signal.SIGCONT)

    with ThreadPoolExecutor(4) as pool:
        undisturbed = pool.submit(Client(swarm, key, tokens).read, swarm.other_url)
        job_id = submit(swarm, key, tokens)
        named = pool.submit(once, swarm, key, tokens, end.__name__)
        two = pool.submit(Client(swarm, key, tokens, choices=2).read, swarm.url)
        client = Client(swarm, key, tokens)
        client.read(swarm.url, 20, interrupt)
        assert client.end is None or client.end["code"] == "restarting"
        assert [(each["code"], each["azu"]["url"]) for each in refusals] == [("stream_elsewhere", swarm.url)]
        interrupted = two.result()
        if end is Program.stop:
            swarm.coordinator, swarm.url = swarm.start_coordinator()
        there = swarm.other_url if end is Program.kill else swarm.url
        again = pool.submit(interrupted.read, there)
        client.read(there)
        clients = [client, again.result(), undisturbed.result()]
        if end is Program.kill:
            swarm.coordinator, swarm.url = swarm.start_coordinator()
        answer = named.result()
    wait_until(lambda: result(swarm.other_url, key, job_id)["ended_at"] is not None, "the submitted job")
    submitted = result(swarm.url, key, job_id)
    texts = [text for each in clients for text in each.texts]
    assert set(texts) == {answer.choices[0].message.content}
    # It is drawn, and not greedy: it may draw its end.
    is_whole = submitted["usage"]["completion_tokens"] == tokens or submitted["finish_reason"] == "stop"
    assert (submitted["status"], is_whole) == ("done", True)
    assert [each.end["completion_tokens"] for each in clients] == [tokens, 2 * tokens, tokens]
    usages = [*(each.end["azu"] for each in clients), submitted["usage"]["azu"], answer.usage.model_extra["azu"]]
    assert money(swarm.url, key) == (before - sum(int(each["cost"]) for each in usages), 0)
    assert {stage["state"] for each in usages for stage in each["stages"]} == {"credited"}
    again_answer = once(swarm, key, tokens, end.__name__)
    assert again_answer == answer


def test_no_worker_was_given_other_layers_in_all_this(swarm: Pair, key: str, database: str) -> None:
    assert [len(worker.found("stage ready")) for worker in swarm.workers] == [1, 1]

    async def verify() -> list[Any]:
        async with Ledger.open(database, currency="wei") as ledger:
            return list(await ledger.verify())

    assert trio.run(verify) == []
