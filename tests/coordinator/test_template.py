"""A template may be hostile: what it cannot do to the coordinator."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from azu.errors import InputError, ModelError
from coordinator.template import ChatTemplate

USER = {"role": "user", "content": "Hello there"}
# Brings it down on this message only.
ON_DEMAND = "{% if messages[0].content == 'die' %}{{ 'x' * 10**11 }}{% endif %}{{ messages[0].content }}"


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


@pytest.fixture(autouse=True)
def _leaves_no_process() -> Iterator[None]:
    before = children()
    yield
    gc.collect()
    assert children() <= before


def render(template: ChatTemplate, content: str = "Hello there") -> str:
    return template.render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * (messages | length * 10**11) }}",
        "{% set ns = namespace(s='x' * 99) %}{% for _ in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ '%*d' | format(messages | length * 10**9 * 2, 1) }}",
        "{{ messages[0].content.center(10**11) }}",
        "{% for _ in range(99999) %}{% for _ in range(999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    ],
)
def test_memory_is_bounded(source: str) -> None:
    # Some of these are computed while the template compiles.
    with pytest.raises(ModelError) as caught:
        render(ChatTemplate(source, {}, "m", cpu_s=60))
    assert caught.value.code == "bad_chat_template"


@pytest.mark.parametrize(
    "source",
    [
        "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length + 9) ** (10 ** 9) }}",  # one instruction, which no thread can be stopped in
    ],
)
def test_time_is_bounded(source: str) -> None:
    template = ChatTemplate(source, {}, "m", cpu_s=0.5)
    used = time.process_time()
    with pytest.raises(ModelError, match="too much time or memory") as caught:
        render(template)
    assert caught.value.code == "bad_chat_template"
    assert time.process_time() - used < 0.4  # not in this process


def test_a_template_that_was_brought_down_renders_again() -> None:
    template = ChatTemplate(ON_DEMAND, {}, "m")
    for _ in range(3):
        with pytest.raises(ModelError):
            render(template, "die")
        assert render(template) == "Hello there"
    assert template._renderer is not None
    template._renderer._process.kill()
    with suppress(ModelError):  # this one finds out
        render(template)
    assert render(template) == "Hello there"


def test_text_comes_and_goes_unchanged() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "m")
    for content in ("naïve 東京 🙂", "a\nb\r\n\x00\u2028", "\ud800", "x" * 10_000_000):
        assert render(template, content) == content
    with pytest.raises(ModelError, match="ValueError"):
        template.render([USER | {"tool_calls": [10**5000]}])


def test_names_and_literals() -> None:
    template = ChatTemplate("a{{ bos_token }}{{ 'b' }}", {"bos_token": "<s>"}, "m")
    assert template.literals.split("\0") == ["a", "b"]
    assert render(template) == "a<s>b"


def test_refusals_and_faults() -> None:
    with pytest.raises(InputError, match="in turns"):
        render(ChatTemplate("{{ raise_exception('in turns') }}", {}, "m"))
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        render(ChatTemplate("{{ 1 / (messages | length - 1) }}", {}, "m"))
    with pytest.raises(ModelError, match="broken"):
        ChatTemplate("{% if %}", {}, "m")
