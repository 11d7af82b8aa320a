"""A model's chat template, rendered in a process of its own (`coordinator.template_process`), which the kernel bounds.

The process starts with the template, waits at its standard input, costs some 20 MB, and ends with the coordinator. One
that a template brought down is replaced at the next render.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

from azu.errors import InputError, ModelError

__all__ = ["ChatTemplate"]

_COMMAND: Final = (sys.executable, "-P", "-m", "coordinator.template_process")  # -P: not what lies in our directory
CPU_S: Final = 10.0  # for one render; that of 10,000 messages takes less than one
MAX_ANSWER_CHARS: Final = 256 << 20  # JSON spells one character with up to 12


class ChatTemplate:
    """One template; `render` may be called from any thread, one at a time gets through.

    `literals` is all text that stands in the template, between NULs.

    Args:
        names: the model's special tokens, such as "bos_token".
        cpu_s: the processor's time that one render may take.

    Raises:
        ModelError: code "bad_chat_template", where it does not compile.
    """

    def __init__(self, source: str, names: Mapping[str, str], model_id: str, *, cpu_s: float = CPU_S) -> None:
        self._model_id = model_id
        self._source = json.dumps({"source": source, "names": dict(names), "cpu_s": cpu_s})
        self._lock = threading.Lock()
        self._renderer: _Renderer | None = None
        with self._lock:
            self.literals = self._started()

    def render(self, messages: Sequence[Any]) -> str:
        """The prompt's text.

        Raises:
            ModelError: code "bad_chat_template", where it fails, or takes too much time or memory.
            InputError: code "bad_messages", where it refuses the messages.
        """
        try:
            line = json.dumps(messages)
        except (ValueError, RecursionError) as error:
            raise self._fails(f"{type(error).__name__}: {error}") from error
        with self._lock:
            if self._renderer is None:
                self._started()
            answer = self._ask(line)
        if "refused" in answer:
            raise InputError(
                f"the chat template of {self._model_id} refuses these messages: {answer['refused']}",
                code="bad_messages",
                remedy="Check the order and the roles of the messages.",
            )
        if "failed" in answer:
            raise self._fails(answer["failed"])
        return answer["text"]

    def _started(self) -> str:
        self._renderer = _Renderer()
        answer = self._ask(self._source)
        if "text" not in answer:
            self._end()
            problem = answer.get("refused") or answer.get("failed")
            raise ModelError(f"{self._model_id}'s chat template is broken: {problem}", code="bad_chat_template")
        return answer["text"]

    def _ask(self, line: str) -> dict[str, str]:
        renderer = self._renderer
        text = "" if renderer is None else renderer.ask(line)
        if not text.endswith("\n"):
            self._end()
            return {"failed": "it takes too much time or memory"}
        answer: dict[str, str] = json.loads(text)
        return answer

    def _end(self) -> None:
        if self._renderer is not None:
            self._renderer.end()
            self._renderer = None

    def _fails(self, problem: str) -> ModelError:
        return ModelError(
            f"the chat template of {self._model_id} fails on these messages ({problem})",
            code="bad_chat_template",
            remedy="Send plain text messages, or use another model.",
        )


class _Renderer:
    """The process; it ends with its last reference."""

    def __init__(self) -> None:
        process = subprocess.Popen(  # noqa: S603 - our own program
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="ascii"
        )
        self._process = process
        self.end = weakref.finalize(self, _end, process)

    def ask(self, line: str) -> str:
        """Its answer; without a newline at the end where it died or says too much."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return ""
        try:
            stdin.write(line + "\n")
            stdin.flush()
            return stdout.readline(MAX_ANSWER_CHARS)
        except (OSError, ValueError):  # it is gone
            return ""


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    try:
        process.communicate()  # closes its pipes, and takes its status
    except (OSError, ValueError):
        process.wait()
