"""The operator's token: who sends it over HTTP may do what fills the coordinator's disk."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from azu.config import CoordinatorSettings
from azu.durable import replace_synced
from azu.errors import InputError, InternalError

__all__ = ["admin_token"]

_MIN_CHARS = 16  # 8 random bytes in hex; a guess a millisecond would take longer than the universe is old
_MAX_CHARS = 1024


def admin_token(settings: CoordinatorSettings) -> str:
    """The token that is set, or the one in data_dir/admin-token, which is made where missing (mode 0600).

    Raises:
        InputError: code "bad_admin_token", where it is too short, or its file cannot be read.
    """
    if settings.admin_token is not None:
        return _checked(settings.admin_token.get_secret_value(), "AZU_ADMIN_TOKEN")
    path = settings.admin_token_file or _made(settings.data_dir / "admin-token")
    try:
        with path.open() as file:
            text = file.read(_MAX_CHARS + 2)
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the admin token {path} cannot be read ({error})"
        raise InputError(
            problem, code="bad_admin_token", remedy="Name another file with --admin-token-file."
        ) from error
    return _checked(text.strip(), str(path))


def _made(path: Path) -> Path:
    if path.exists():
        return path
    temporary = path.with_name(f"{path.name}.tmp")  # this process holds the data folder
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_urlsafe(32).encode() + b"\n")
            replace_synced(file, temporary, path)
    except OSError as error:
        problem = f"{path} cannot be made: {error.strerror}"
        raise InternalError(problem, code="storage", remedy="Give --data-dir a writable folder.") from error
    return path


def _checked(token: str, where: str) -> str:
    if not (_MIN_CHARS <= len(token) <= _MAX_CHARS and token.isascii() and token.isprintable() and " " not in token):
        remedy = f"Use {_MIN_CHARS} or more random letters and digits, or let the coordinator make one."
        raise InputError(f"the admin token in {where} is not usable", code="bad_admin_token", remedy=remedy)
    return token
