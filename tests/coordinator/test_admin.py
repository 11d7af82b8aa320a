"""Where the operator's token comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from azu.config import CoordinatorSettings
from azu.errors import InputError
from coordinator.admin import admin_token

TOKEN = "0123456789abcdef0123456789abcdef"


def test_it_is_made_once_and_kept_to_the_owner(tmp_path: Path) -> None:
    settings = CoordinatorSettings(data_dir=tmp_path)
    made = admin_token(settings)
    assert len(made) >= 32
    assert (tmp_path / "admin-token").stat().st_mode & 0o777 == 0o600
    assert admin_token(settings) == made
    assert [path.name for path in tmp_path.iterdir()] == ["admin-token"]


def test_what_the_operator_sets_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text(f"{TOKEN}\n")
    assert admin_token(CoordinatorSettings(data_dir=tmp_path, admin_token_file=tmp_path / "file")) == TOKEN
    monkeypatch.setenv("AZU_ADMIN_TOKEN", TOKEN[::-1])
    settings = CoordinatorSettings(data_dir=tmp_path)
    assert admin_token(settings) == TOKEN[::-1]
    assert TOKEN[::-1] not in repr(settings)
    assert not (tmp_path / "admin-token").exists()


@pytest.mark.parametrize("text", ["", "short", "with a space in it and long", "é" * 20, "x" * 2_000])
def test_what_is_no_token(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError) as caught:
        admin_token(CoordinatorSettings(data_dir=tmp_path, admin_token_file=tmp_path / "file"))
    assert caught.value.code == "bad_admin_token"
    with pytest.raises(InputError, match="cannot be read"):
        admin_token(CoordinatorSettings(data_dir=tmp_path, admin_token_file=tmp_path / "none"))
