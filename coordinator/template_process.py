"""The process that renders one model's chat template, started by `coordinator.template`: `python -m` this file.

A template is a program from a hub. Jinja's sandbox keeps it from Python's internals, but not from looping for ever or
from filling the memory, and neither can be stopped inside a thread. Here the kernel does: a render that takes too much
of either ends this process, and nothing else.

One JSON value a line: the template's source, names and seconds come in, then messages; each is answered by one object.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["main"]

MEMORY_BYTES: Final = 1 << 30  # of address space; the largest request is 10 MiB, and its prompt not much more
# Templates test these with "is none" too.
_NOTHING: Final = {"tools": None, "documents": None}


def main() -> None:
    """Serve standard input until it ends, which it does with the coordinator."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the coordinator's to answer
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process, whatever that is busy with
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    template: _ChatTemplate | None = None
    cpu_s = 10.0
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            value = json.loads(line)
            if template is None:
                cpu_s = value["cpu_s"]
                template = _ChatTemplate(value["source"], value["names"])
                answer = {"text": template.literals}
            else:
                answer = {"text": template.render(value)}
            text = json.dumps(answer)
        except jinja2.TemplateError as error:
            text = json.dumps({"refused": error.message or ""})
        # Whatever an expression in a template makes of values that it was not written for.
        except Exception as error:
            text = json.dumps({"failed": f"{type(error).__name__}: {error}"[:1_000]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


class _ChatTemplate:
    """A compiled template, in the environment that transformers gives it."""

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),  # noqa: DTZ005 - the template's local date
            "namespace": _Namespace,
        }
        self._template = environment.from_string(source)
        tree = environment.parse(source)
        parts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        parts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self.literals = "\0".join(parts)
        self._names = dict(names)

    def render(self, messages: list[Any]) -> str:
        return self._template.render({"messages": messages, "add_generation_prompt": True, **_NOTHING, **self._names})


class _GenerationBlock(Extension):
    """{% generation %}, by which training marks the assistant's tokens: here it only shows its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, by which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace has no names that begin with an underscore")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
