"""Data folders: private, held by one process at a time, and let go whatever happens."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from azu.datadir import open_data_dir, share_data_dir
from azu.errors import InputError, InternalError

HOLDER = """
import sys
from pathlib import Path
from azu.datadir import open_data_dir, share_data_dir
with open_data_dir(Path(sys.argv[1])) as identity:
    print(identity.peer_id, flush=True)
    sys.stdin.readline()
"""


def test_the_folder_and_its_key_are_made_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with open_data_dir(path) as identity:
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "identity.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((path / "lock").stat().st_mode) == 0o600
    with open_data_dir(path) as again:
        assert again == identity


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with open_data_dir(tmp_path):
        with pytest.raises(InputError) as raised, open_data_dir(tmp_path):
            pytest.fail("held twice")
        assert raised.value.code == "data_dir_in_use"
        assert "--data-dir" in raised.value.remedy
        with pytest.raises(InputError), open_data_dir(tmp_path):  # the refusal did not let go of the first one's lock
            pytest.fail("held twice")


def test_it_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_data_dir(tmp_path):
        raise ZeroDivisionError
    with open_data_dir(tmp_path):
        pass


def test_another_process_is_kept_out_until_the_holder_dies(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        peer_id = holder.stdout.readline().strip()
        with pytest.raises(InputError), open_data_dir(tmp_path):
            pytest.fail("held twice")
        holder.kill()  # no chance to clean up: the kernel lets go
        holder.wait()
    with open_data_dir(tmp_path) as identity:
        assert identity.peer_id == peer_id


def test_an_exposed_key_is_refused_and_the_lock_let_go(tmp_path: Path) -> None:
    with open_data_dir(tmp_path):
        pass
    (tmp_path / "identity.key").chmod(0o644)
    with pytest.raises(InputError) as raised, open_data_dir(tmp_path):
        pytest.fail("opened")
    assert raised.value.code == "key_exposed"
    (tmp_path / "identity.key").chmod(0o600)
    with open_data_dir(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InternalError) as raised, open_data_dir(path):
            pytest.fail("opened")
        assert str(path) in raised.value.message
        assert "--data-dir" in raised.value.remedy


def test_a_folder_that_is_held_can_be_shared(tmp_path: Path) -> None:
    path = tmp_path / "data"
    shared = share_data_dir(path)
    assert path.stat().st_mode & 0o777 == 0o700
    with open_data_dir(path) as identity:
        assert share_data_dir(path).peer_id == identity.peer_id == shared.peer_id
    with pytest.raises(InternalError):
        share_data_dir(tmp_path / "data" / "identity.key")
