from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from azu.cli import begin_logging, program, report, run_program, settings_options
from azu.config import CoordinatorSettings, DhtSettings, NodeSettings, ShardSettings
from azu.errors import CapacityError, InputError, NetworkError

ROOT = Path(__file__).resolve().parent.parent
PEER = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
BOOTSTRAP = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"


@program("azu-node", examples=["azu-node join MULTIADDR --vram 8GiB", "AZU_VRAM=8GiB azu-node join MULTIADDR"])
def main() -> None:
    """Lend this machine to a swarm."""


@main.command()
@click.option("--note", default="none")
@settings_options(NodeSettings, positional="bootstrap")
def join(settings: NodeSettings, note: str) -> None:
    """Join a swarm."""
    click.echo(f"{note} {settings.model_dump_json(exclude_unset=True)}")


@main.command()
@settings_options(CoordinatorSettings)
def serve(settings: CoordinatorSettings) -> None:
    click.echo(settings.model_dump_json(exclude_unset=True))


@main.command()
@settings_options(ShardSettings, positional="model")
def cut(settings: ShardSettings) -> None:
    """Cut.

    A second paragraph.
    """
    click.echo(settings.model_dump_json(exclude_unset=True))


@main.command()
@settings_options(DhtSettings)
def collect(settings: DhtSettings) -> None:
    before = gc.isenabled(), gc.get_freeze_count()
    begin_logging(settings)
    click.echo(f"{before} {gc.isenabled()} {gc.get_freeze_count() > 1_000}")


@main.command()
@click.argument("kind")
def fail(kind: str) -> None:
    errors: dict[str, BaseException] = {
        "ours": NetworkError("the bootstrap is down", remedy="start it"),
        "input": InputError("that is no model"),
        "group": ExceptionGroup("a", [ExceptionGroup("b", [CapacityError("no room", remedy="wait")]), KeyError("bug")]),
        "bug": KeyError("bug"),
        "interrupt": BaseExceptionGroup("c", [KeyboardInterrupt(), KeyError("bug")]),
        "exit": BaseExceptionGroup("d", [SystemExit(7)]),
    }
    raise errors[kind]


@program("azu-dht", examples=["azu-dht MULTIADDR"], single=True)
@settings_options(DhtSettings, positional="bootstrap")
def look(settings: DhtSettings) -> None:
    """Look."""
    click.echo(settings.model_dump_json(exclude_unset=True))


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("AZU_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return


def run(*words: str, command: click.Command = main) -> Result:
    return CliRunner().invoke(command, words, terminal_width=110)


# --- options ---


def test_settings_from_the_command_line() -> None:
    result = run("join", BOOTSTRAP, "--vram", "8GiB", "--log-json", "--trust", PEER, "--trust", PEER, "--note", "hi")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("hi {")
    assert '"vram":8589934592' in result.stdout
    assert '"log_json":true' in result.stdout
    assert f'"trust":["{PEER}","{PEER}"]' in result.stdout
    assert f'"bootstrap":["{BOOTSTRAP}"]' in result.stdout


def test_the_command_line_beats_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_DEVICE", "cuda:1")
    monkeypatch.setenv("AZU_LOG_JSON", "true")
    monkeypatch.setenv("AZU_BOOTSTRAP", BOOTSTRAP)
    result = run("join", "--device", "cpu", "--no-log-json")
    assert result.stdout == f'none {{"log_json":false,"bootstrap":["{BOOTSTRAP}"],"device":"cpu"}}\n'


def test_what_is_switched_off_by_its_name_is_switched_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert '"no_hub":true' in run("join", "--no-hub").stdout
    monkeypatch.setenv("AZU_NO_HUB", "true")
    assert '"no_hub":false' in run("join", "--hub").stdout
    assert "--no-no-" not in run("join", "--help").stdout


def test_a_list_is_one_option_repeated() -> None:
    assert run("serve", "--model", "a", "--model", "b").stdout == '{"models":["a","b"]}\n'


def test_a_secret_has_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_ADMIN_TOKEN", "a-token-that-is-long-enough")
    assert run("serve").stdout == '{"admin_token":"**********"}\n'
    assert "--admin-token-file FILE" in run("serve", "--help").stdout
    assert run("serve", "--admin-token", "x").exit_code == 2


def test_a_required_argument_is_named() -> None:
    result = run("cut")
    assert (result.exit_code, result.stderr) == (
        2,
        "azu-node: error: MODEL is missing\n  remedy: see `azu-node cut --help`\n",
    )
    assert run("cut", "a/b").stdout == '{"model":"a/b"}\n'
    assert "for what MODEL takes" in run("cut", "").stderr


def test_a_program_of_one_command() -> None:
    assert run(BOOTSTRAP, "--json", command=look).stdout == f'{{"bootstrap":["{BOOTSTRAP}"],"as_json":true}}\n'
    assert "--version" in run("--help", command=look).stdout


def test_help_teaches() -> None:
    text = run("join", "--help").stdout
    flat = " ".join(text.split())
    assert "[MULTIADDR]..." in text
    assert "env: AZU_BOOTSTRAP" in flat
    assert "--vram SIZE Memory to offer" in flat
    assert "default: ~/.azu/node; env: AZU_DATA_DIR" in flat
    assert "--dtype [auto|float32|float16|bfloat16|int8|int4]" in flat


def test_root_help_has_version_and_examples() -> None:
    result = run("--help")
    assert "Examples:\n  azu-node join MULTIADDR --vram 8GiB\n  AZU_VRAM=8GiB azu-node" in result.stdout
    assert run("--version").stdout == "azu-node 0.1.0\n"


# --- errors ---


def test_a_bad_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("join", "--vram", "lots")
    assert result.exit_code == 2
    assert result.stderr.startswith("azu-node: error: --vram: 'lots' is not a size\n  remedy: write it like \"8GiB\"")
    result = run("join", "here")
    assert result.stderr.startswith("azu-node: error: MULTIADDR: 'here' is not a usable multiaddr")
    result = run("join", "--threads", "none")
    assert "--threads: input should be a valid integer" in result.stderr
    assert "remedy: see `azu-node join --help`" in result.stderr


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_VRAM", "lots")
    assert "error: the environment variable AZU_VRAM: 'lots'" in run("join").stderr


def test_a_bad_line_in_the_file_is_named() -> None:
    Path(".env").write_text("AZU_VRAM=lots\n")
    assert "error: AZU_VRAM in .env: 'lots'" in run("join").stderr


def test_an_unreadable_file_is_told() -> None:
    Path(".env").write_bytes(b"AZU_VRAM=\xff\n")
    result = run("join")
    assert result.exit_code == 2
    assert "the .env file here cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("ours", 1, "azu-node: error: the bootstrap is down\n  remedy: start it\n"),
        ("input", 2, "azu-node: error: that is no model\n"),
        ("interrupt", 130, ""),
        ("exit", 7, ""),
    ],
)
def test_an_error_is_told_without_its_stack(kind: str, code: int, text: str) -> None:
    result = run("fail", kind)
    assert (result.exit_code, result.stderr) == (code, text)


def test_bugs_are_told_apart() -> None:
    result = run("fail", "bug")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "azu-node: error: unexpected KeyError: 'bug'\n  remedy: this is a bug; run with --debug"
    )


def test_groups_are_taken_apart_ours_first() -> None:
    lines = run("fail", "group").stderr.splitlines()
    assert lines[:2] == ["azu-node: error: no room", "  remedy: wait"]
    assert lines[2] == "azu-node: error: unexpected KeyError: 'bug'"


def test_the_stack_is_shown_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in run("--debug", "fail", "ours").stderr
    assert "Traceback" in run("join", "--debug", "--vram", "x").stderr
    assert "Traceback" not in run("fail", "ours").stderr
    monkeypatch.setenv("AZU_DEBUG", "1")
    assert "Traceback" in run("fail", "ours").stderr


def test_the_same_error_from_many_tasks_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ExceptionGroup("x", [NetworkError("gone"), NetworkError("gone")]), program="p") == 1
    assert capsys.readouterr().err == "p: error: gone\n"


# --- run_program ---


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ModuleNotFoundError("No module named 'torch'", name="torch"), program="azu-node") == 2
    assert capsys.readouterr().err == (
        "azu-node: error: azu-node needs torch, which is not installed\n  remedy: Run: pip install 'azu[node]'\n"
    )
    assert report(ModuleNotFoundError("No module named 'node.gone'", name="node.gone"), program="azu-node") == 1
    assert "unexpected" in capsys.readouterr().err


def test_it_returns_what_the_main_task_returned() -> None:
    async def answer() -> int:
        return 42

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_program(answer) == 42
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_garbage_is_collected_once_a_command_has_its_imports() -> None:
    result = run("collect", "--bootstrap", BOOTSTRAP)
    assert result.stdout == "(False, 0) True True\n", result.output
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
    assert run("fail", "bug").exit_code == 1
    assert gc.isenabled()


PROGRAM = """
import sys, time
from functools import partial
import trio
from azu.cli import program, run_program, settings_options
from azu.config import BootstrapSettings

@program("azu-bootstrap", examples=[], single=True)
@settings_options(BootstrapSettings)
def main(settings):
    async def serve(how):
        try:
            print("ready", flush=True)
            if how == "asked":
                await asked.wait()
                return
            if how == "hang":
                while True:
                    time.sleep(0.01)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                print("cleaning", flush=True)
                await trio.sleep(60 if how == "slow" else 0.01)
                print("clean", flush=True)
    asked = trio.Event()
    run_program(partial(serve, HOW), settings=settings, at_signal=asked.set if HOW == "asked" else None)

HOW = sys.argv.pop(1)
main()
"""


class Started:
    def __init__(self, how: str, *words: str) -> None:
        command = [sys.executable, "-c", PROGRAM, how, *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        assert self.stdout.readline() == "ready\n"

    def end(self, *numbers: signal.Signals) -> tuple[int, str, str]:
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.2)
        try:
            out, err = self.process.communicate(timeout=20)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture
def hangup(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a program that is started now does at SIGHUP: these tests, too, may run under nohup."""
    before = signal.signal(signal.SIGHUP, request.param)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("hangup", [signal.SIG_DFL], indirect=True, ids=["terminal"])
@pytest.mark.parametrize("how", ["well", "asked"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_stops_cleanly(number: signal.Signals, code: int, how: str) -> None:
    returned, out, err = Started(how).end(number)
    assert (returned, out) == (code, "cleaning\nclean\n")
    assert "Traceback" not in err
    assert f"stopping  signal={number.name}" in err


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("hangup", [signal.SIG_IGN], indirect=True, ids=["nohup"])
def test_under_nohup_it_outlives_its_terminal() -> None:
    returned, out, err = Started("well").end(signal.SIGHUP, signal.SIGTERM)
    assert (returned, out) == (0, "cleaning\nclean\n")
    assert "signal=SIGTERM" in err


def test_a_second_signal_ends_at_once() -> None:
    returned, out, _err = Started("slow").end(signal.SIGTERM, signal.SIGINT)
    assert (returned, out) == (130, "cleaning\n")


def test_a_hanging_loop_can_still_be_ended() -> None:
    assert Started("hang").end(signal.SIGTERM, signal.SIGTERM)[0] == 143


def test_json_logs_leave_nothing_else_on_stderr() -> None:
    import json

    _, _, err = Started("well", "--log-json").end(signal.SIGTERM)
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["stopping"]


# --- weight ---


def test_importing_the_frame_is_fast() -> None:
    code = "import sys, azu.cli; print(*sorted({'trio', 'pydantic', 'libp2p', 'torch', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
