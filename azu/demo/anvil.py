"""A local EVM chain for the demo: anvil, found on this machine or fetched from the npm registry."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from azu.errors import InputError

__all__ = ["anvil_command", "find_anvil"]

_PACKAGE = "@foundry-rs/anvil-linux-amd64"
_VERSION = "1.7.1"
_SHA256 = "10c1c727d6c1de973aeb160e59875b9a9a23464d6e74149ee8abb30b3500311b"
_FETCH_S = 300
_REMEDY = "Install Foundry's anvil so that it is on the PATH, or npm, with which it is fetched on Linux x86-64"


def anvil_command(binary: Path, port: int, chain_id: int, *options: str) -> list[str]:
    """What starts a chain that makes a block of each transaction as it comes, at HyperEVM's usual base fee."""
    chain = ["--chain-id", str(chain_id), "--hardfork", "cancun", "--base-fee", "100000000"]
    return [str(binary), "--host", "127.0.0.1", "--port", str(port), *chain, *options]


def find_anvil(home: Path) -> Path:
    """The anvil of the PATH, else the one in `home`, which is fetched into it where missing. Blocks.

    Raises:
        InputError: code "no_anvil".
    """
    if (known := shutil.which("anvil")) is not None:
        return Path(known)
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("npm") is None:
        raise InputError("anvil is not installed", code="no_anvil", remedy=_REMEDY)
    home = home.expanduser()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        binary = home / "node_modules" / _PACKAGE / "bin/anvil"
        if not binary.exists() or _digest(binary) != _SHA256:
            _fetch(home)
        if not binary.exists() or _digest(binary) != _SHA256:
            raise InputError(f"{binary} is not the anvil {_VERSION} that azu knows", code="no_anvil", remedy=_REMEDY)
    return binary


def _fetch(home: Path) -> None:
    command = ["npm", "install", "--prefix", str(home), "--ignore-scripts", "--no-save", "--no-audit", "--no-fund",
               "--loglevel=error", f"{_PACKAGE}@{_VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_S, check=False)  # noqa: S603 - fixed
    if done.returncode != 0:
        raise InputError(f"npm cannot fetch {_PACKAGE}: {done.stderr[-300:]}", code="no_anvil", remedy=_REMEDY)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
