from __future__ import annotations

from itertools import pairwise

import httpx
import openai
import pytest
import trio
from openai.types.chat import ChatCompletionChunk, ChatCompletionUserMessageParam
from tokenizers import Tokenizer

from coordinator.api import ApiSettings
from coordinator.api.auth import address_of
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.twin import CONTEXT, LAYERS, MODEL_ID, PEERS, Twin

QUESTION: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
EMOJI = "naïve 👩‍👩‍👧 日本 \u2028 end"


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


async def test_plain_answer(client: openai.OpenAI, twin: Twin) -> None:
    answer = await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION))
    assert answer.object == "chat.completion"
    assert answer.id == "chatcmpl-job1"
    assert answer.model == MODEL_ID
    assert answer.system_fingerprint == f"azu-{twin.served[0].manifest.digest[:12]}"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == twin.answer
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(twin.requests[0].prompt)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    positions = answer.usage.total_tokens - 1  # the last token is sampled and never run
    assert answer.usage.model_extra is not None
    azu = answer.usage.model_extra["azu"]
    assert azu["job_id"] == "job1"
    assert azu["token_layers"] == positions * LAYERS
    assert azu["cost"] == 2 * positions * LAYERS
    assert azu["stages"][0] == {
        "peer_id": PEERS[0],
        "layers": [0, LAYERS // 2],
        "tokens": positions,
        "token_layers": positions * LAYERS // 2,
        "earned": positions * LAYERS // 2,
        "state": "credited",
    }
    assert (twin.entered, twin.left, twin.finished) == (1, 1, 1)


async def test_requests_wait_in_turns_of_their_clients(client: openai.OpenAI, twin: Twin) -> None:
    await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION, n=2))
    assert [request.account for request in twin.requests] == ["127.0.0.1"] * 2


@pytest.mark.parametrize(
    ("address", "account"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, ""),
        ("<local>", ""),
    ],
)
def test_an_account_is_a_clients_address(address: str | None, account: str) -> None:
    assert address_of(address) == account


async def test_stream_begins_with_the_role_and_ends_with_the_reason(client: openai.OpenAI, twin: Twin) -> None:
    chunks = await in_thread(
        lambda: list(client.chat.completions.create(model=MODEL_ID, messages=QUESTION, stream=True))
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert text_of(chunks) == twin.answer
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert len(chunks) > 5


async def test_stream_ends_with_usage_where_asked(client: openai.OpenAI) -> None:
    chunks = await in_thread(
        lambda: list(
            client.chat.completions.create(
                model=MODEL_ID, messages=QUESTION, stream=True, stream_options={"include_usage": True}
            )
        )
    )
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.model_extra is not None
    assert usage.completion_tokens > 0
    assert [stage["peer_id"] for stage in usage.model_extra["azu"]["stages"]] == list(PEERS)
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_stream_on_the_wire(url: str) -> None:
    body = {"model": MODEL_ID, "messages": QUESTION, "stream": True}
    response = await in_thread(lambda: httpx.post(f"{url}/v1/chat/completions", json=body))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"].startswith("req_")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(event.startswith("data: ") for event in response.text.split("\n\n") if event)


async def test_characters_split_over_tokens_arrive_whole(client: openai.OpenAI, twin: Twin) -> None:
    twin.answer = EMOJI
    chunks = await in_thread(
        lambda: list(client.chat.completions.create(model=MODEL_ID, messages=QUESTION, stream=True))
    )
    assert text_of(chunks) == EMOJI
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_the_answer_and_the_job(client: openai.OpenAI, twin: Twin, stream: bool) -> None:
    twin.stall_after = 25  # if it went on, it would hang

    def ask() -> tuple[str | None, str | None]:
        if stream:
            made = client.chat.completions.create(model=MODEL_ID, messages=QUESTION, stop=["France is"], stream=True)
            chunks = list(made)
            return text_of(chunks), chunks[-1].choices[0].finish_reason
        choice = client.chat.completions.create(model=MODEL_ID, messages=QUESTION, stop="France is").choices[0]
        return choice.message.content, choice.finish_reason

    twin.answer = "The capital of France is Paris." * 5
    assert await in_thread(ask) == ("The capital of ", "stop")
    assert (twin.finished, twin.left) == (1, 1)


async def test_length_ends_the_answer(client: openai.OpenAI, twin: Twin) -> None:
    answer = await in_thread(
        lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION, max_completion_tokens=3)
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert twin.requests[0].max_tokens == 3


async def test_default_length_is_what_the_context_leaves(client: openai.OpenAI, twin: Twin) -> None:
    await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION))
    assert twin.requests[0].max_tokens == CONTEXT - len(twin.requests[0].prompt)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_run_at_once_with_their_own_seeds(client: openai.OpenAI, twin: Twin, stream: bool) -> None:
    twin.pause_s = 0.002

    def ask() -> list[str | None]:
        if stream:
            chunks = list(
                client.chat.completions.create(
                    model=MODEL_ID,
                    messages=QUESTION,
                    n=3,
                    seed=7,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            assert chunks[-1].usage is not None
            assert len({chunk.id for chunk in chunks}) == 1
            assert sum(bool(chunk.choices and chunk.choices[0].finish_reason) for chunk in chunks) == 3
            return [text_of(chunks, index) for index in range(3)]
        answer = client.chat.completions.create(model=MODEL_ID, messages=QUESTION, n=3, seed=7)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(twin.requests[0].prompt)
        return [choice.message.content for choice in answer.choices]

    assert await in_thread(ask) == [twin.answer] * 3
    assert sorted(request.sampling.seed for request in twin.requests) == [7, 8, 9]
    assert twin.most_at_once == 3


async def test_sampling_reaches_the_ticket(client: openai.OpenAI, twin: Twin) -> None:
    await in_thread(
        lambda: client.chat.completions.create(
            model=MODEL_ID,
            messages=QUESTION,
            temperature=0,
            top_p=0,
            presence_penalty=0.1234567891,
            frequency_penalty=-2,
            seed=-1,
            user="somebody",
            store=False,
            metadata={"a": "b"},
            tools=[],
            logprobs=False,
            response_format={"type": "text"},
            extra_body={"top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1},
        )
    )
    sampling = twin.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0.0, 0, 0.05, 1.1)
    assert 0 < sampling.top_p < 1e-5
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.123457, -2.0)
    assert sampling.seed == 2**63 - 1


async def test_seeds_are_random_where_none_is_given(client: openai.OpenAI, twin: Twin) -> None:
    for _ in range(2):
        await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION))
    first, second = (request.sampling for request in twin.requests)
    assert first.seed != second.seed
    assert first.temperature == 1.0


async def test_roles_and_content_parts(client: openai.OpenAI, twin: Twin) -> None:
    echoed = await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION))
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": parts},
        echoed.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=messages))  # type: ignore[arg-type]
    tokenizer_file = twin.served[0].tokenizer_files["tokenizer.json"]
    text = Tokenizer.from_file(str(tokenizer_file)).decode(list(twin.requests[1].prompt), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n"
        f"<|im_start|>assistant\n{twin.answer}<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_models(client: openai.OpenAI, url: str) -> None:
    listed = await in_thread(lambda: client.models.list())
    assert [model.id for model in listed.data] == [MODEL_ID]
    model = await in_thread(lambda: client.models.retrieve(MODEL_ID))
    assert (model.id, model.object, model.owned_by, model.created) == (MODEL_ID, "model", "azu", 1_700_000_000)
    plain = await in_thread(lambda: httpx.get(f"{url}/v1/models/{MODEL_ID}"))
    assert plain.json()["id"] == MODEL_ID


async def test_health(url: str, twin: Twin) -> None:
    response = await in_thread(lambda: httpx.get(f"{url}/healthz"))
    assert (response.status_code, response.json()["status"]) == (200, "ok")
    twin.covered = False
    response = await in_thread(lambda: httpx.get(f"{url}/healthz"))
    assert (response.status_code, response.json()["status"]) == (503, "degraded")
    (health,) = response.json()["models"]
    assert health["missing"] == [[10, 20], [29, 30]]
    assert "10-19, 29" in health["message"]


async def test_many_at_once(client: openai.OpenAI, twin: Twin) -> None:
    twin.pause_s = 0.005
    answers: list[str | None] = []

    async def ask() -> None:
        answer = await in_thread(lambda: client.chat.completions.create(model=MODEL_ID, messages=QUESTION))
        answers.append(answer.choices[0].message.content)

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(ask)
    assert answers == [twin.answer] * 12
    assert twin.most_at_once > 6


@pytest.mark.parametrize("settings", [ApiSettings(keep_alive_s=0.05)])
async def test_comments_keep_a_silent_stream_alive(url: str, twin: Twin, settings: ApiSettings) -> None:
    twin.pause_s = 0.12
    twin.answer = "Hello"
    body = {"model": MODEL_ID, "messages": QUESTION, "stream": True}
    response = await in_thread(lambda: httpx.post(f"{url}/v1/chat/completions", json=body))
    comments = response.text.count(": keep-alive\n")
    assert comments > 1
    events = [event for event in response.text.replace(": keep-alive\n", "").split("\n\n") if event]
    assert '"role":"assistant"' in events[0]
    assert events[-1] == "data: [DONE]"
    assert not any(a == b == events[0] for a, b in pairwise(events))
