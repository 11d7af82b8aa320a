"""The file that a private swarm's key is in."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

from azu.config import BootstrapSettings
from azu.errors import InputError
from azu.swarm_key import read_swarm_key, write_new_swarm_key
from bootstrap.cli import main

KEY = bytes(range(32))
HEAD = b"/key/swarm/psk/1.0.0/\n"


def write(folder: Path, data: bytes) -> Path:
    path = folder / "swarm.key"
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"/base16/\n" + KEY.hex().encode() + b"\n",
        HEAD + b"/base16/\n" + KEY.hex().upper().encode(),  # js-libp2p writes no newline
        HEAD.replace(b"\n", b"\r\n") + b"/base16/\r\n" + KEY.hex().encode() + b"\r\n",
        HEAD + b"/base64/\n" + base64.b64encode(KEY) + b"\n",
        HEAD + b"/bin/\n" + KEY,
    ],
)
def test_every_encoding_is_read(tmp_path: Path, data: bytes) -> None:
    assert read_swarm_key(write(tmp_path, data)) == KEY


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "first line"),
        (KEY.hex().encode(), "first line"),
        (HEAD + KEY.hex().encode(), "second line"),
        (HEAD + b"/base16/\n" + b"zz" * 32, "third line is not base16"),
        (HEAD + b"/base64/\n" + b"%" * 44, "third line is not base64"),
        (HEAD + b"/base16/\n" + bytes(31).hex().encode(), "31 bytes"),
        (HEAD + b"/bin/\n" + bytes(33), "33 bytes"),
        (HEAD + b"/bin/\n" + bytes(1_000_000), "bytes of key and not 32"),
    ],
)
def test_what_is_no_key_is_told_so(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        read_swarm_key(write(tmp_path, data))
    assert caught.value.code == "bad_swarm_key"
    assert caught.value.remedy


def test_a_missing_key_is_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="new-swarm-key") as caught:
        read_swarm_key(tmp_path / "none")
    assert caught.value.code == "no_swarm_key"


def test_a_new_key_is_for_its_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_new_swarm_key(one)
    write_new_swarm_key(other)
    assert one.stat().st_mode & 0o777 == 0o600
    key = read_swarm_key(one)
    assert key != read_swarm_key(other)
    with pytest.raises(InputError) as caught:
        write_new_swarm_key(one)
    assert caught.value.code == "swarm_key_exists"
    assert read_swarm_key(one) == key


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, HEAD + b"/bin/\n" + KEY)
    with caplog.at_level(logging.WARNING):
        read_swarm_key(path)
        assert not caplog.records
        path.chmod(0o640)
        read_swarm_key(path)
    assert [each.message for each in caplog.records] == ["others can read the swarm key"]
    assert KEY.hex() not in str([each.__dict__ for each in caplog.records])


def test_the_command_makes_one_that_settings_take(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    made = CliRunner().invoke(main, ["new-swarm-key", str(path)])
    assert made.exit_code == 0, made.output
    assert f"--swarm-key {path}" in made.output
    assert BootstrapSettings(swarm_key=path).swarm_key == path
    again = CliRunner().invoke(main, ["new-swarm-key", str(path)])
    assert again.exit_code != 0


def test_a_bad_key_is_found_before_anything_starts(tmp_path: Path) -> None:
    path = write(tmp_path, b"hello")
    done = CliRunner().invoke(main, ["run", "--swarm-key", str(path), "--data-dir", str(tmp_path / "data")])
    assert done.exit_code == 2, done.output
    assert "is not a swarm key" in done.output
    assert not (tmp_path / "data").exists()
