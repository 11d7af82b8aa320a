"""The systemd units and the compose file in docs/: linted, and every command in them understood by our programs."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
UNITS = sorted((ROOT / "docs/systemd").glob("*.service"))
COMPOSE = ROOT / "docs/compose.yaml"


def test_there_are_units() -> None:
    assert [each.name for each in UNITS] == ["azu-bootstrap.service", "azu-node.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="SYSTEMD IS MISSING: its units are not verified")
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/azu/bin", str(BIN)))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_command_of_a_unit_is_understood(unit: Path, tmp_path: Path) -> None:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(unit)
    service = parsed["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    folder = arguments[arguments.index("--data-dir") + 1]
    assert folder == f"/var/lib/{service['StateDirectory']}", "it may write nowhere else"
    assert is_understood(Path(program).name, arguments, {}, tmp_path)


def is_understood(program: str, arguments: list[str], environment: dict[str, str], folder: Path) -> bool:
    """Whether a program takes these settings: with a data folder that cannot be, it then complains of that and ends."""
    (folder / "file").touch()
    done = subprocess.run(
        [BIN / program, *arguments, "--data-dir", str(folder / "file/data")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
    )
    return "error: the data folder" in done.stderr and "cannot be used" in done.stderr


def test_a_command_with_an_unknown_option_would_not_be_understood(tmp_path: Path) -> None:
    assert not is_understood("azu-bootstrap", ["run", "--no-such-option"], {}, tmp_path)
    assert not is_understood("azu-bootstrap", ["run"], {"AZU_METRICS": "nonsense"}, tmp_path)


def test_the_compose_file_fits_its_schema() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_builds_what_there_is_and_keeps_what_matters() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name, service in compose["services"].items():
        assert service["build"]["target"] in targets
        assert (COMPOSE.parent / service["build"]["context"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
        assert service["volumes"] == [f"{name}:/data"]
        assert name in compose["volumes"]


@pytest.mark.parametrize(("service", "program", "command"), [("bootstrap", "azu-bootstrap", "run")])
def test_the_settings_of_a_compose_service_are_understood(
    service: str, program: str, command: str, tmp_path: Path
) -> None:
    given = {"AZU_ANNOUNCE": "/ip4/203.0.113.7/tcp/4001"}
    environment = yaml.safe_load(COMPOSE.read_text())["services"][service]["environment"]
    filled = {name: re.sub(r"\$\{(\w+).*\}", lambda found: given[found[1]], text) for name, text in environment.items()}
    assert is_understood(program, [command], filled, tmp_path)
