"""Command line options out of a settings class, so that help, variables and checks are said once (in azu.config)."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource

from azu.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

    from azu.config import BaseAzuSettings

__all__ = ["DEBUG_META", "settings_options"]

ENV_ONLY = ""  # a field's option, where it shall have none: a secret on a command line is seen by every user
DEBUG_META = "azu.debug"  # in click's meta: --debug was given, before or after the sub-command

S = TypeVar("S", bound="BaseAzuSettings")


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def settings_options(cls: type[S], *, positional: str | None = None) -> Decorator:
    """Give a command one option for each field of the settings, and call it with the finished settings.

    The command's function gets the settings as its first argument, and its own click options as keywords.

    Args:
        cls: the settings class; its fields' descriptions become the help.
        positional: a field that is written without an option name; one that is a list takes several words.
    """
    shown = {name: field for name, field in cls.model_fields.items() if _extra(field, "option") != ENV_ONLY}
    parameters = [_parameter(cls, name, field, name == positional) for name, field in shown.items()]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @click.pass_context
        @wraps(function)
        def command(ctx: click.Context, /, **values: Any) -> Any:
            own = {name: values.pop(name) for name in [*values] if name not in cls.model_fields}
            given = {name: value for name, value in values.items() if _was_typed(ctx, name)}
            return ctx.invoke(function, _build(cls, ctx, given), **own)

        own_parameters = getattr(function, "__click_params__", [])
        if positional is not None:  # click shows no help for arguments
            field = cls.model_fields[positional]
            command.__doc__ = (
                f"{cleandoc(function.__doc__ or '')}\n\n{_metavar(field)}: {_help(cls, positional, field)}"
            )
        command.__click_params__ = [*own_parameters, *reversed(parameters)]  # type: ignore[attr-defined]
        return command

    return decorate


def _was_typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _parameter(cls: type[BaseAzuSettings], name: str, field: FieldInfo, is_positional: bool) -> click.Parameter:
    kind = _bare_type(field.annotation)
    many = get_origin(kind) is tuple
    if is_positional:
        shown = f"[{_metavar(field)}]" + ("..." if many else "")
        return click.Argument([name], nargs=-1 if many else 1, required=False, metavar=shown, type=str)
    option, text = _option_name(name, field), _help(cls, name, field)
    if kind is bool:
        opposite = "--" + option[5:] if option.startswith("--no-") else "--no-" + option[2:]
        return click.Option([f"{option}/{opposite}", name], default=None, help=text)
    choices = click.Choice(get_args(kind)) if get_origin(kind) is Literal else click.STRING
    # Text as typed: pydantic converts and checks it, as it does for a variable.
    return click.Option([option, name], multiple=many, type=choices, metavar=_metavar(field), help=text)


def _bare_type(annotation: Any) -> Any:
    """The type without its `| None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _metavar(field: FieldInfo) -> str | None:
    named = {int: "NUMBER", Path: "FOLDER", str: "TEXT"}.get(_bare_type(field.annotation))
    return _extra(field, "metavar") or named


def _extra(field: FieldInfo, key: str) -> str | None:
    extra = field.json_schema_extra
    value = extra.get(key) if isinstance(extra, Mapping) else None
    return value if isinstance(value, str) else None


def _option_name(name: str, field: FieldInfo) -> str:
    return _extra(field, "option") or "--" + name.replace("_", "-")


def _variable(cls: type[BaseAzuSettings], name: str) -> str:
    return f"{cls.model_config.get('env_prefix', '')}{name}".upper()


def _help(cls: type[BaseAzuSettings], name: str, field: FieldInfo) -> str:
    notes = [f"env: {_variable(cls, name)}"]
    if not field.is_required() and field.default not in (None, (), False):
        default = " ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        default = "on" if field.default is True else default
        notes.insert(0, f"default: {default}")
    return f"{field.description} [{'; '.join(notes)}]"


def _build(cls: type[S], ctx: click.Context, given: dict[str, Any]) -> S:
    from pydantic import ValidationError

    if ctx.meta.get(DEBUG_META):
        given.setdefault("debug", True)
    if given.get("debug"):
        ctx.meta[DEBUG_META] = True
    try:
        settings = cls(**given)
    except ValidationError as error:
        raise _told(cls, ctx, error, given) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the .env file here cannot be read: {error}", remedy="mend it, or run elsewhere") from error
    ctx.meta[DEBUG_META] = settings.debug
    return settings


def _told(
    cls: type[BaseAzuSettings], ctx: click.Context, error: ValidationError, given: Mapping[str, Any]
) -> InputError:
    """The first thing that is wrong, named as the operator wrote it: an option, a variable, or a line in .env."""
    first = error.errors(include_input=False)[0]
    name = _field_of(cls, str(first["loc"][0]) if first["loc"] else "")
    field = cls.model_fields.get(name)
    option = _option_name(name, field) if field is not None else name
    argument = any(isinstance(p, click.Argument) and p.name == name for p in ctx.command.params)
    variable = _told_variable(cls, name)
    shown = (_metavar(field) if argument and field is not None else None) or option
    if first["type"] == "missing":
        problem, remedy = f"{shown} is missing", f"see `{ctx.command_path} --help`"
        return InputError(problem, code="missing_option", remedy=remedy)
    if name in given:
        where = shown
    else:
        where = f"the environment variable {variable}" if _in_environment(variable) else f"{variable} in .env"
    remedy = str(first.get("ctx", {}).get("remedy") or f"see `{ctx.command_path} --help` for what {shown} takes")
    return InputError(f"{where}: {_lowered(first['msg'])}", code="bad_setting", remedy=remedy)


def _told_variable(cls: type[BaseAzuSettings], name: str) -> str:
    """The variable as the operator wrote it: some have an older name too, without the prefix."""
    variable, older = _variable(cls, name), name.upper()
    field = cls.model_fields.get(name)
    is_older = field is not None and field.validation_alias is not None and not _in_environment(variable)
    return older if is_older and _in_environment(older) else variable


def _field_of(cls: type[BaseAzuSettings], place: str) -> str:
    """The field that an error is about: pydantic names one that has aliases by the first of them."""
    from pydantic import AliasChoices

    for name, field in cls.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices) and place in field.validation_alias.choices:
            return name
    return place


def _in_environment(variable: str) -> bool:
    return any(name.upper() == variable for name in os.environ)


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
