"""Workers of one machine see who else computes, and take one thread each while they outnumber the CPUs' halves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from node.engine import sharing
from node.engine.sharing import Board, Sharing, turns_on

OTHER = """
import sys
from pathlib import Path
from node.engine.sharing import Board
board = Board(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    print(board.begin() if line == "begin\\n" else board.end(), flush=True)
"""


class Other:
    """A worker's board in a process of its own."""

    def __init__(self, path: Path) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", OTHER, path], stdin=pipe, stdout=pipe, text=True)
        assert self._answer() == "ready"

    def say(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def others(path: Path, count: int) -> Iterator[list[Other]]:
    found: list[Other] = []
    try:
        found += (Other(path) for _ in range(count))
        yield found
    finally:
        for each in found:
            each.kill()


def test_each_sees_who_else_is_in_a_pass(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    with others(tmp_path / "board", 2) as (one, two):
        assert board.begin() == 0
        board.end()
        assert one.say("begin") == "0"
        assert two.say("begin") == "1"
        assert board.begin() == 2
        one.say("end")
        assert board.begin() == 1
        board.end()
        assert one.say("begin") == "1"


def test_who_is_killed_in_a_pass_is_forgotten_and_leaves_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "board"
    board = Board(path)
    monkeypatch.setattr(sharing, "_SLOTS", 2)  # of this process: the file has as many as it had
    with others(path, 1) as (one,):
        one.say("begin")
        one.kill()
        assert board.begin() == 1
        monkeypatch.setattr(sharing, "_STALE_S", 0.0)
        assert board.begin() == 0
    with others(path, 1) as (heir,):
        monkeypatch.undo()
        assert board.begin() == 0, "who takes the place has not begun"
        assert heir.say("begin") == "1"


@pytest.mark.parametrize("kind", ["readable", "link", "folder", "full"])
def test_a_file_that_cannot_be_trusted_or_used_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sharing, "_SHM", tmp_path)
    monkeypatch.setattr(sharing, "_SLOTS", 1)
    turn = turns_on("cpu", 2)
    assert turn is not nullcontext
    [path] = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    if kind == "readable":
        path.touch(0o644)
    elif kind == "link":
        (tmp_path / "mine").write_text("precious")
        path.symlink_to(tmp_path / "mine")
    elif kind == "folder":
        path.mkdir()
    else:
        with others(path, 1):
            assert turns_on("cpu", 2) is nullcontext
        return
    assert turns_on("cpu", 2) is nullcontext
    assert kind != "link" or (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(("device", "threads"), [("cuda:0", 2), ("cpu", 1)])
def test_there_is_nothing_to_share_on_a_gpu_or_with_one_thread(
    device: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_SHM", tmp_path)
    assert turns_on(device, threads) is nullcontext
    assert not list(tmp_path.iterdir())


class Counted:
    """A board on which so many others are."""

    def __init__(self) -> None:
        self.others = 0
        self.begun = 0

    def begin(self) -> int:
        self.begun += 1
        return self.others

    def end(self) -> None:
        self.begun -= 1


def test_a_pass_has_one_thread_while_others_leave_no_more_and_all_of_them_otherwise() -> None:
    cpus = os.sched_getaffinity(0)
    board, seen = Counted(), list[tuple[int, set[int], int]]()

    def work() -> None:
        first = {min(cpus)}
        os.sched_setaffinity(0, first)  # as OpenMP leaves it
        torch.set_num_threads(3)
        subject = Sharing(board, cpus, 3)  # type: ignore[arg-type]
        for board.others in (0, len(cpus), 2 * len(cpus), 0, 0):
            with subject.turn():
                seen.append((torch.get_num_threads(), os.sched_getaffinity(0), board.begun))
        with pytest.raises(ZeroDivisionError), subject.turn():
            _ = 1 / 0
        assert board.begun == 0
        large = Sharing(board, set(range(8)), 3)  # type: ignore[arg-type]
        for board.others in (1, 3):
            with large.turn():
                seen.append((torch.get_num_threads(), os.sched_getaffinity(0), board.begun))

    before = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    first = {min(cpus)}
    alone, beside = (3, first, 1), (1, cpus, 1)
    assert seen == [alone, beside, beside, alone, alone, alone, alone]
