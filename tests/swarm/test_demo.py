"""azu-demo as a newcomer runs it: the answer, the figures, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from azu.demo.anvil import find_anvil
from azu.errors import InputError
from tests.local_swarm import wait_until
from tests.payments.conftest import ANVIL_HOME

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

DEMO = str(Path(sys.executable).with_name("azu-demo"))


def read_document(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON document that the demo prints while it stays up."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("}"):
            break
    return dict(json.loads("".join(lines)))


@pytest.mark.timeout(600)  # three workers, a chain and the unsplit model on two busy cores
def test_the_demo_answers_pays_its_workers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [DEMO, "--json", "--keep", "--payments", "anvil", "--device", "cpu"]
    env = {**os.environ, "PATH": f"{anvil_folder()}:{os.environ['PATH']}"}
    with (tmp_path / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path, env=env
        )
        try:
            figures = read_document(process)
            said = "The swarm stays up until Ctrl-C."
            wait_until(lambda: said in (tmp_path / "stderr").read_text(), "the ways into the swarm")
            children = psutil.Process(process.pid).children(recursive=True)
            # a chain, a bootstrap node, a coordinator and its template process, three workers
            assert len(children) == 7
            folders = {word for child in children for word in child.cmdline() if "azu-demo-" in word}
            assert folders
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130
            assert psutil.wait_procs(children, timeout=60)[1] == []
            assert not any(Path(folder).exists() for folder in folders)
        finally:
            process.kill()
            process.communicate()
    assert figures["answer"] == "The capital of France is Paris."
    assert figures["finish"] == "stop"
    assert [stage["start"] for stage in figures["stages"]][1:] == [stage["end"] for stage in figures["stages"]][:-1]
    assert (figures["stages"][0]["start"], figures["stages"][-1]["end"]) == (0, 30)
    assert all(stage["state"] == "credited" and stage["earned"] > 0 for stage in figures["stages"])
    assert figures["token_layers"] == 30 * (figures["prompt_tokens"] + figures["completion_tokens"] - 1)
    assert figures["ttft_s"] > 0
    assert figures["tokens_per_s"] > 0
    assert all(0 < worker["resident_bytes"] < figures["unsplit_resident_bytes"] for worker in figures["workers"])
    told = (tmp_path / "stderr").read_text()
    assert "curl " in told
    assert "azu-node join /ip4/127.0.0.1/tcp/" in told
    assert "as it has them now" in told
    check_payments(figures)


def anvil_folder() -> Path:
    try:
        return find_anvil(ANVIL_HOME).parent
    except InputError as error:
        pytest.skip(f"NO CHAIN, so nothing here shows that the demo works and pays: {error}")


def check_payments(figures: dict[str, Any]) -> None:
    paid = figures["payments"]
    assert figures["unit"] == "wei"
    assert paid["chain"] == "eip155:998"
    assert paid["deposited"] == 10**18
    assert paid["available"] == 10**18 - figures["cost"]
    earned = {stage["worker"]: stage["earned"] for stage in figures["stages"]}
    assert len(earned) == 3
    assert paid["workers"] == earned, "to the last wei"
    assert 9 * 10**18 > paid["client"] > 9 * 10**18 - 10**15, "the deposit and its fee are gone"
    assert 11 * 10**18 - sum(earned.values()) > paid["platform"] > 11 * 10**18 - 10**15


def test_a_demo_that_cannot_work_says_why_and_fails(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    result = subprocess.run(
        [DEMO, "--model", str(tmp_path / "missing.gguf")],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "missing.gguf does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(temporary.iterdir()) == []
