from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from azu.errors import CapacityError, InternalError, NetworkError
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.twin import CONTEXT, MODEL_ID, Twin, served_model

USER = {"role": "user", "content": "Hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def request_with(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "messages": [USER], **changes}


def messages(*items: Any) -> dict[str, Any]:
    return request_with(messages=list(items))


BAD_REQUESTS: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("no messages", {"model": MODEL_ID}, "missing_required_parameter", "messages"),
    ("no model", {"messages": [USER]}, "missing_required_parameter", "model"),
    ("empty messages", messages(), "invalid_value", "messages"),
    ("messages no list", request_with(messages="Hello"), "invalid_type", "messages"),
    ("message no object", messages("Hello"), "invalid_type", "messages[0]"),
    ("no role", messages({"content": "x"}), "missing_required_parameter", "messages[0].role"),
    ("odd role", messages(USER, {"role": "king", "content": "x"}), "invalid_value", "messages[1].role"),
    ("no content", messages({"role": "user"}), "missing_required_parameter", "messages[0].content"),
    (
        "null content",
        messages({"role": "assistant", "content": None}),
        "missing_required_parameter",
        "messages[0].content",
    ),
    ("number content", messages({"role": "user", "content": 5}), "invalid_type", "messages[0].content"),
    ("image", messages({"role": "user", "content": [IMAGE]}), "unsupported_content", "messages[0].content[0]"),
    (
        "part without type",
        messages({"role": "user", "content": [{}]}),
        "missing_required_parameter",
        "messages[0].content[0].type",
    ),
    (
        "part without text",
        messages({"role": "user", "content": [{"type": "text"}]}),
        "missing_required_parameter",
        "messages[0].content[0]",
    ),
    ("lone surrogate", messages({"role": "user", "content": "\ud800"}), "invalid_json", None),
    ("max_tokens 0", request_with(max_tokens=0), "invalid_value", "max_tokens"),
    ("max_tokens negative", request_with(max_completion_tokens=-1), "invalid_value", "max_completion_tokens"),
    ("max_tokens text", request_with(max_tokens="5"), "invalid_type", "max_tokens"),
    ("max_tokens huge", request_with(max_tokens=1_000_000), "context_length_exceeded", "messages"),
    ("max_tokens huger", request_with(max_tokens=2**70), "context_length_exceeded", "messages"),
    (
        "both lengths",
        request_with(max_tokens=1, max_completion_tokens=1),
        "invalid_parameter_combination",
        "max_tokens",
    ),
    ("prompt too long", messages({"role": "user", "content": "é" * CONTEXT}), "context_length_exceeded", "messages"),
    ("temperature", request_with(temperature=2.1), "invalid_value", "temperature"),
    ("temperature bool", request_with(temperature=True), "invalid_type", "temperature"),
    ("top_p", request_with(top_p=-0.1), "invalid_value", "top_p"),
    ("repetition", request_with(repetition_penalty=0), "invalid_value", "repetition_penalty"),
    ("seed", request_with(seed=2**63), "invalid_value", "seed"),
    ("five stops", request_with(stop=list("abcde")), "invalid_value", "stop"),
    ("stop number", request_with(stop=[1]), "invalid_type", "stop[0]"),
    ("n 0", request_with(n=0), "invalid_value", "n"),
    ("n 9", request_with(n=9), "integer_above_max_value", "n"),
    ("stream text", request_with(stream="yes"), "invalid_type", "stream"),
    ("stream_options", request_with(stream_options={}), "invalid_parameter_combination", "stream_options"),
    ("tools", request_with(tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
    ("tool_choice", request_with(tool_choice="required"), "unsupported_parameter", "tool_choice"),
    ("logprobs", request_with(logprobs=True), "unsupported_parameter", "logprobs"),
    ("logit_bias", request_with(logit_bias={"1": 5}), "unsupported_parameter", "logit_bias"),
    ("format", request_with(response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
    ("audio", request_with(modalities=["text", "audio"]), "unsupported_parameter", "modalities"),
    ("unknown", request_with(temprature=1), "unknown_parameter", "temprature"),
]


@pytest.mark.parametrize(
    ("body", "code", "param"), [row[1:] for row in BAD_REQUESTS], ids=[row[0] for row in BAD_REQUESTS]
)
async def test_bad_requests(url: str, twin: Twin, body: dict[str, Any], code: str, param: str | None) -> None:
    response = await in_thread(
        lambda: httpx.post(
            f"{url}/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert twin.requests == []


async def test_messages_say_what_to_do(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with(max_tokens=1_000_000)))
    assert f"maximum context length is {CONTEXT} tokens" in caught.value.message
    assert "1000000 in the completion" in caught.value.message
    assert "Please reduce" in caught.value.message
    with pytest.raises(openai.BadRequestError, match=r"'image_url' are not supported.*Send its text"):
        await in_thread(lambda: client.chat.completions.create(**messages({"role": "user", "content": [IMAGE]})))


async def test_unknown_model_names_the_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL_ID) as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with(model="gpt-4o")))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        await in_thread(lambda: client.models.retrieve("a/b"))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b"", {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b"[]", {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b'{"model": "\xff"}', {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b'{"temperature": NaN}', {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b"[" * 90_000, {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b"x" * 100_001, {"Content-Type": "application/json"}, 413, "request_too_large"),
        (b"x" * 30_000_000, {"Content-Type": "application/json"}, 413, "request_too_large"),
    ],
    ids=["open", "empty", "list", "utf-8", "nan", "deep", "text", "no type", "a byte more", "far more"],
)
async def test_bad_bodies(url: str, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    response = await in_thread(lambda: httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_chunked_body_over_the_limit(url: str) -> None:
    def parts() -> Any:
        for _ in range(20):
            yield b"x" * 50_000

    headers = {"Content-Type": "application/json"}
    response = await in_thread(lambda: httpx.post(f"{url}/v1/chat/completions", content=parts(), headers=headers))
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/a/b", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes(url: str, method: str, path: str, status: int, code: str) -> None:
    response = await in_thread(lambda: httpx.request(method, url + path))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, None)
    assert path in error["message"]
    assert ("Allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry_after"),
    [
        (CapacityError("no live worker has layers 10-19", code="model_not_covered"), 503, "model_not_covered", "15"),
        (CapacityError("all workers are busy"), 503, "no_capacity", "2"),
        (CapacityError("all workers are busy", retry_after_s=41.2), 503, "no_capacity", "42"),
        (CapacityError("all workers are busy", retry_after_s=0.01), 503, "no_capacity", "1"),
        (NetworkError("the stage of layers 0-9 cannot be reached"), 502, "unreachable", None),
    ],
)
async def test_no_job(
    client: openai.OpenAI, twin: Twin, stream: bool, refusal: Exception, status: int, code: str, retry_after: str | None
) -> None:
    twin.refusal = refusal
    with pytest.raises(openai.InternalServerError, match=r"layers|busy") as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with(stream=stream)))
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (status, code, "server_error")
    assert caught.value.response.headers.get("Retry-After") == retry_after


@pytest.mark.parametrize("stream", [False, True])
async def test_failure_before_the_first_token_is_a_status(client: openai.OpenAI, twin: Twin, stream: bool) -> None:
    twin.failure = NetworkError("stage 2 was lost", remedy="Send the request again.")
    with pytest.raises(openai.InternalServerError, match=r"stage 2 was lost\. Send the request again") as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with(stream=stream)))
    assert caught.value.status_code == 502
    assert twin.left == 1


async def test_failure_in_mid_stream_raises_in_the_client(client: openai.OpenAI, twin: Twin) -> None:
    twin.failure, twin.fail_after = NetworkError("stage 2 was lost"), 6
    texts: list[str] = []

    def ask() -> None:
        chunks = client.chat.completions.create(**request_with(stream=True))
        texts.extend(chunk.choices[0].delta.content or "" for chunk in chunks)

    with pytest.raises(openai.APIError, match="stage 2 was lost") as caught:
        await in_thread(ask)
    assert caught.value.code == "unreachable"
    assert "".join(texts)
    assert twin.answer.startswith("".join(texts))


async def test_failed_stream_has_no_done(url: str, twin: Twin) -> None:
    twin.failure, twin.fail_after = NetworkError("stage 2 was lost"), 6
    response = await in_thread(lambda: httpx.post(f"{url}/v1/chat/completions", json=request_with(stream=True)))
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unreachable"


@pytest.mark.parametrize("failure", [ZeroDivisionError("secret"), InternalError("secret")])
async def test_bugs_are_logged_and_not_told(
    client: openai.OpenAI, twin: Twin, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    twin.failure = failure
    with pytest.raises(openai.InternalServerError) as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with()))
    assert caught.value.status_code == 500
    assert "secret" not in caught.value.response.text
    assert "Traceback" in caplog.text
    assert "secret" in caplog.text


async def test_one_failed_choice_ends_the_others(client: openai.OpenAI, twin: Twin) -> None:
    twin.failure, twin.fail_after, twin.pause_s = NetworkError("stage 2 was lost"), 3, 0.002
    with pytest.raises(openai.InternalServerError, match="stage 2"):
        await in_thread(lambda: client.chat.completions.create(**request_with(n=4)))
    assert twin.entered == twin.left == 4


async def test_model_without_a_template(client: openai.OpenAI, twin: Twin, tmp_path: Any) -> None:
    twin.served.append(served_model(tmp_path, model_id="base", template=None))
    with pytest.raises(openai.BadRequestError, match="has no chat template") as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with(model="base")))
    assert caught.value.code == "no_chat_template"


async def test_template_that_refuses_the_messages(client: openai.OpenAI, twin: Twin, tmp_path: Any) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    twin.served.append(served_model(tmp_path, model_id="picky", template=template))
    with pytest.raises(openai.BadRequestError, match="System role not supported") as caught:
        await in_thread(lambda: client.chat.completions.create(**request_with(model="picky")))
    assert (caught.value.code, caught.value.param) == ("bad_messages", "messages")
