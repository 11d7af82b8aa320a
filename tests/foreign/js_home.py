"""js-libp2p from the npm registry, as js/package-lock.json pins it: installed once, into .cache/js-libp2p."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["install", "why_not"]

SOURCE = Path(__file__).parent / "js"
HOME = Path(__file__).parents[2] / ".cache/js-libp2p"
OLDEST_NODE = 20
INSTALL_S = 240  # it takes some 5 s


def why_not() -> str:
    """Why js-libp2p cannot run here; empty if it can."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return f"node and npm are missing: install Node.js {OLDEST_NODE} or newer"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=60).stdout
    found = re.match(r"v(\d+)\.", version)
    if found is None or int(found[1]) < OLDEST_NODE:
        return f"node {version.strip()} is too old: install Node.js {OLDEST_NODE} or newer"
    return ""


def install(source: Path = SOURCE, home: Path = HOME) -> Path:
    """Fill `home` with the packages that `source` pins, unless they are there, and with its scripts; return `home`.

    Several test processes may call this at once. Raises RuntimeError with npm's own words if npm fails.
    """
    home.mkdir(parents=True, exist_ok=True)
    pins = [source / "package.json", source / "package-lock.json"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in pins)).hexdigest()
    stamp = home / "installed"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest:
            stamp.unlink(missing_ok=True)
            for path in pins:
                shutil.copy(path, home)
            _npm_ci(home)
            stamp.write_text(digest)
        for script in source.glob("*.mjs"):
            # Renamed into place: another process may be reading what is there.
            replaced_by = home / f"{script.name}.new"
            shutil.copy(script, replaced_by)
            replaced_by.replace(home / script.name)
    return home


def _npm_ci(home: Path) -> None:
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=INSTALL_S, env=_environment())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed in {home}:\n{done.stdout}{done.stderr}")


def _environment() -> dict[str, str]:
    """Without NODE_ENV and the like, which would change what is installed."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("NODE_", "npm_config_omit"))}
