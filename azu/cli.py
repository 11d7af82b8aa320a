"""What the command lines of all programs share: options out of settings, errors with remedies, clean stops.

    @program("azu-node", examples=["azu-node join /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW... --vram 8GiB"])
    def main() -> None:
        '''Lend this machine to a swarm.'''

    @main.command()
    @settings_options(NodeSettings, positional="bootstrap")
    def join(settings: NodeSettings) -> None:
        '''Join a swarm and serve layers until stopped.'''
        from node.service import serve  # heavy imports stay inside, so that --help is fast

        run_program(partial(serve, settings), settings=settings)

Exit codes: 0 done, or stopped by SIGTERM; 1 it failed; 2 the input was wrong; 130 stopped by SIGINT (Ctrl-C). The first
signal cancels the main task, whose cleanup runs, or asks it to end; a second one ends the process at once with 128 +
its number.

Nothing heavy is imported up here: no trio, pydantic, libp2p or torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar, overload

import click

from azu.errors import AzuError, InputError
from azu.logs import OURS, configure_logging, is_json, log
from azu.options import DEBUG_META, settings_options

if TYPE_CHECKING:
    from types import FrameType

    from azu.config import BaseAzuSettings

__all__ = ["ProgramCommand", "ProgramGroup", "begin_logging", "program", "report", "run_program", "settings_options"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

# What a plain `pip install azu` leaves out, by the program that needs it.
_EXTRAS = {"azu-node": "node", "azu-coordinator": "coordinator", "azu-demo": "demo"}

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
EXIT_AFTER = {signal.SIGTERM: 0, signal.SIGINT: EXIT_INTERRUPTED, signal.SIGHUP: 129}


class _Reporting(click.Command):
    """Ends in one readable line on stderr and an exit code, whatever was raised below."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _collecting_later():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own business
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except (Exception, BaseExceptionGroup) as error:  # the border: nothing above can say it better
            ctx.exit(report(error, program=str(self.name), debug=bool(ctx.meta.get(DEBUG_META))))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples as they were written: click would refold them into a paragraph."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class ProgramGroup(_Reporting, click.Group):
    """A program with sub-commands."""


class ProgramCommand(_Reporting):
    """A program that is one command."""


@overload
def program(name: str, *, examples: Sequence[str]) -> Callable[[Callable[..., Any]], ProgramGroup]: ...
@overload
def program(
    name: str, *, examples: Sequence[str], single: Literal[True]
) -> Callable[[Callable[..., Any]], ProgramCommand]: ...
def program(name: str, *, examples: Sequence[str], single: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function a program's entry point: a group of commands, or one command where `single`.

    Args:
        name: the program as the shell knows it; error lines and logs begin with it.
        examples: lines that a reader can type, shown at the end of --help.
        single: without sub-commands; the function then takes its own options or `settings_options`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
        kind = ProgramCommand if single else ProgramGroup
        command = click.command(name, cls=kind, epilog="\n".join(examples), context_settings=settings)(function)
        has_debug = any("--debug" in parameter.opts for parameter in command.params)
        command.params += [_version_option(name)] if has_debug else [_version_option(name), _debug_option()]
        return command

    return decorate


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """A command begins with its imports: up to 750,000 objects, of which next to none are garbage. To look for some
    meanwhile took a quarter of a worker's start. `begin_logging`, which follows them, ends this.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def _version_option(name: str) -> click.Option:
    def show(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            with contextlib.suppress(PackageNotFoundError):
                click.echo(f"{name} {version('azu')}")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version and exit."
    )


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
        if wanted:
            ctx.meta[DEBUG_META] = True

    text = "Show the stack trace when something fails. [env: AZU_DEBUG]"
    return click.Option(["--debug"], is_flag=True, envvar="AZU_DEBUG", expose_value=False, callback=remember, help=text)


def report(error: BaseException, *, program: str, debug: bool = False) -> int:
    """Tell the operator on stderr what went wrong, and return the exit code.

    Groups are taken apart: azu's own errors come first, each with its remedy; anything else is a bug and gets one line.
    Where the log is JSON, everything becomes log records, so that stderr stays readable by machines.
    """
    leaves = [_explained(leaf, program) for leaf in _leaves(error)]
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return EXIT_INTERRUPTED
    for leaf in leaves:
        if isinstance(leaf, SystemExit) and isinstance(leaf.code, int):
            return leaf.code
    if debug and not is_json():
        traceback.print_exception(error)
    unique = {(type(leaf), str(leaf)): leaf for leaf in sorted(leaves, key=lambda leaf: not isinstance(leaf, AzuError))}
    for leaf in unique.values():
        _tell(leaf, program, debug)
    return EXIT_BAD_INPUT if all(isinstance(leaf, InputError) for leaf in leaves) else EXIT_FAILED


def _explained(error: BaseException, program: str) -> BaseException:
    """A package that only an extra brings, as an error that names the extra; anything else as it is."""
    extra = _EXTRAS.get(program)
    if not isinstance(error, ModuleNotFoundError) or extra is None or (error.name or "").split(".")[0] in OURS:
        return error
    return InputError(
        f"{program} needs {error.name}, which is not installed",
        code="missing_package",
        remedy=f"Run: pip install 'azu[{extra}]'",
    )


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _tell(error: BaseException, program: str, debug: bool) -> None:
    expected = isinstance(error, AzuError)
    if is_json():
        known = {"code": error.code, "remedy": error.remedy} if isinstance(error, AzuError) else {"code": "internal"}
        exc_info = error if debug or not expected else None
        message = error.message if isinstance(error, AzuError) else f"{type(error).__name__}: {error}"
        log(logger, logging.ERROR, "program failed", exc_info=exc_info, error=message, **known)
        return
    if isinstance(error, AzuError):
        click.echo(f"{program}: error: {error.message}", err=True)
        remedy = error.remedy
    else:
        click.echo(f"{program}: error: unexpected {type(error).__name__}: {error}", err=True)
        remedy = "" if debug else "this is a bug; run with --debug for the stack trace, and report it with that"
        if not debug:
            logger.debug("unexpected error", exc_info=error)
    if remedy:
        click.echo(f"  remedy: {remedy}", err=True)


def begin_logging(settings: BaseAzuSettings) -> None:
    """Log, and report errors, as the settings say; a command calls it after its imports, and `run_program` does it for
    those that need trio.
    """
    configure_logging(json=settings.log_json, level=settings.log_level, program=_program_name())
    if not gc.isenabled():
        gc.freeze()  # what was imported stays: a collection that looks at it stops a worker for a third of a second
        gc.enable()


def run_program(
    main: Callable[[], Awaitable[T]],
    *,
    settings: BaseAzuSettings | None = None,
    at_signal: Callable[[], None] | None = None,
) -> T:
    """Run the program's main task under trio until it returns or a signal comes, and return what it returned.

    Args:
        main: the main task; it owns everything else, and it is what a signal cancels.
        settings: where given, logging is set up as they say.
        at_signal: called on the event loop at the first signal in place of that: the main task has to end by itself.

    Raises:
        SystemExit: a signal stopped the main task, after its cleanup.
        Exception: whatever the main task raised, for the program's command to report.
    """
    import trio

    if settings is not None:
        begin_logging(settings)
    stop: _Stop[T] = _Stop()
    trio.run(_until_stopped, main, stop, at_signal)
    if stop.received is not None:
        raise SystemExit(EXIT_AFTER[stop.received])
    return stop.result


async def _until_stopped(
    main: Callable[[], Awaitable[T]], stop: _Stop[T], at_signal: Callable[[], None] | None
) -> None:
    import trio

    with trio.CancelScope() as scope, stop.listening(at_signal or scope.cancel):
        stop.result = await main()


class _Stop(Generic[T]):
    """The signals' handler; as it runs between two bytecodes of the main thread, it works where the loop hangs too."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.result: T  # set where no signal came

    @contextlib.contextmanager
    def listening(self, at_first: Callable[[], None]) -> Iterator[None]:
        """Call that on the event loop at the first signal; put the former handlers back at the end."""
        import trio

        token = trio.lowlevel.current_trio_token()

        def begin(name: str) -> None:
            log(logger, logging.INFO, "stopping", signal=name)
            at_first()

        def handle(number: int, frame: FrameType | None) -> None:
            if self.received is not None:
                _exit_now(number)
            self.received = signal.Signals(number)
            token.run_sync_soon(begin, self.received.name)

        wanted = [number for number in EXIT_AFTER if number != signal.SIGHUP or not _is_ignored(number)]
        former = {number: signal.signal(number, handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN  # as nohup leaves it


def _exit_now(number: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the signal may have come in the middle of a write
            stream.flush()
    os._exit(128 + number)


def _program_name() -> str:
    ctx = click.get_current_context(silent=True)
    return str(ctx.find_root().command.name) if ctx is not None else "azu"
