"""A PostgreSQL server for tests, of this machine's own binaries, on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

# Without fsync a killed client loses nothing, only a killed machine would.
SETTINGS = {"listen_addresses": "", "fsync": "off", "max_connections": "60", "shared_buffers": "64MB"}
LIMIT = 60


def binaries() -> Path | None:
    """The folder with `initdb` and `postgres`; Debian keeps them out of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    places = [*found, *([Path(on_path).resolve()] if on_path else [])]
    return next((path.parent for path in reversed(places) if (path.parent / "initdb").exists()), None)


class Server:
    """A running server; `url` makes a new, empty schema in it, which costs less than a database."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self._folder = folder
        self._tools = tools
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._tools / "postgres"), "-D", str(self._folder / "data"), "-k", str(self._folder), *options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(as_somebody(command), stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                psycopg.connect(self._address).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """End it; SIGQUIT is what a crash looks like to clients, and leaves recovery to the next start."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(LIMIT)

    def url(self) -> str:
        self._count += 1
        name = f"test{self._count}"
        with psycopg.connect(self._address) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self._address}&options=-csearch_path%3D{name}"

    @property
    def _address(self) -> str:
        return f"postgresql://azu@/postgres?host={self._folder}"


@contextmanager
def running(tools: Path) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="azu-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, somebody())
        initdb = [str(tools / "initdb"), "-D", str(folder / "data"), "-U", "azu", "--auth=trust", "--no-sync"]
        done = subprocess.run(
            as_somebody([*initdb, "--no-locale", "--encoding=UTF8"]), capture_output=True, cwd=folder, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr.decode()
        server = Server(folder, tools)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGINT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def somebody() -> str:
    """A user other than root, as whom PostgreSQL agrees to run."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def as_somebody(command: list[str]) -> list[str]:
    """The command, ending with this process, and not as root."""
    drop = [f"--reuid={somebody()}", "--clear-groups"] if os.geteuid() == 0 else []
    gid = [f"--regid={pwd.getpwnam(somebody()).pw_gid}"] if drop else []
    return ["setpriv", *drop, *gid, "--pdeathsig=INT", *command]
