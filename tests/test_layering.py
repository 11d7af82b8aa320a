"""Who may import whom. Imports inside functions and under TYPE_CHECKING count too: a leak is a leak."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("node", "coordinator", "bootstrap")
SOURCES = ("azu", *PROGRAMS)
LONGEST = 400  # lines of one file

SPLICE = (
    "azu/models/cache.py",
    "azu/models/slots.py",
    "azu/models/abreast.py",
    "azu/models/packing.py",
    "azu/models/splice.py",
    "azu/models/architecture.py",
    "azu/models/observe.py",
    "azu/models/surgery.py",
    "azu/models/checkpoint.py",
    "azu/models/quantize.py",
    "azu/models/integer_weights.py",
    "azu/models/prepacked.py",
    "azu/models/siblings.py",
)

# Library -> the files and folders that may import it.
ONLY_IN = {
    ("libp2p", "multiaddr"): ("azu/overlay",),
    ("torch", "transformers"): (*SPLICE, "node/engine"),
    ("web3", "solana", "solders", "eth_account"): ("azu/payments",),
    ("gguf",): ("azu/models",),
    ("sqlalchemy", "alembic", "psycopg"): ("azu/ledger", "azu/accounts"),
    ("asyncio",): (),
    ("pickle", "marshal", "shelve"): (),
}

# Decided in sync code, by arguments alone: no IO, no clock, no chance of its own.
PURE = (
    "azu/wire",
    "azu/crossings.py",
    "azu/statements.py",
    "azu/tickets.py",
    "azu/economics.py",
    "azu/accounts/challenge.py",
    "azu/accounts/keys.py",
    "azu/accounts/message.py",
    "azu/accounts/rate.py",
    "azu/ledger/accounts.py",
    "azu/ledger/digests.py",
    "azu/ledger/page.py",
    "azu/ledger/operations.py",
    "azu/ledger/payouts.py",
    "azu/models/memory.py",
    "azu/planning",
    "coordinator/agreement.py",
    "coordinator/disputes.py",
    "coordinator/hedging.py",
    "coordinator/mending.py",
    "coordinator/planning",
)
IMPURE = (
    "trio",
    "torch",
    "transformers",
    "libp2p",
    "socket",
    "time",
    "random",
    "os",
    "asyncio",
    "subprocess",
    "pathlib",
)


def files_under(*names: str) -> Iterator[Path]:
    for name in names:
        path = ROOT / name
        yield from [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module that the file names in an import, with the dots."""
    found: set[str] = set()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{path}:{statement.lineno}: relative import"
            module = statement.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in statement.names}
    return found


def offenders(paths: Iterable[Path], banned: Iterable[str]) -> list[str]:
    banned = tuple(banned)
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if name.split(".")[0] in banned
    ]


def test_every_import_is_seen(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("import a.b as c\nfrom d import e\ndef f():\n    import g\nif h:\n    from i.j import k\n")
    assert imports_of(sample) == {"a.b", "d", "d.e", "g", "i.j", "i.j.k"}


@pytest.mark.parametrize(("libraries", "homes"), ONLY_IN.items(), ids=lambda value: "+".join(value) or "nowhere")
def test_a_library_is_seen_from_its_home_only(libraries: tuple[str, ...], homes: tuple[str, ...]) -> None:
    at_home = set(files_under(*homes))
    assert offenders((path for path in files_under(*SOURCES) if path not in at_home), libraries) == []


def test_azu_knows_no_program() -> None:
    assert offenders(files_under("azu"), (*PROGRAMS, "benchmarks", "tests")) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_do_not_know_each_other(program: str) -> None:
    others = [other for other in PROGRAMS if other != program]
    assert offenders(files_under(program), (*others, "benchmarks", "tests")) == []


@pytest.mark.parametrize("place", PURE)
def test_the_pure_cores_do_no_io(place: str) -> None:
    assert (ROOT / place).exists(), f"{place} is gone: name its successor in PURE"
    assert offenders(files_under(place), IMPURE) == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files_under(*SOURCES, "benchmarks", "tests", ".ci")}
    assert [f"{path.relative_to(ROOT)}: {count} lines" for path, count in lengths.items() if count > LONGEST] == []


@pytest.mark.parametrize("module", ["coordinator.cli", "coordinator.service", "bootstrap.cli", "bootstrap.service"])
def test_it_runs_without_torch(module: str) -> None:
    assert loaded_by(module, "torch", "transformers") == []


@pytest.mark.parametrize("module", ["node.cli", "coordinator.cli", "bootstrap.cli", "azu.dht_cli", "azu.demo"])
def test_a_command_line_starts_light(module: str) -> None:
    """--help must not wait for what only the running program needs."""
    assert loaded_by(module, "torch", "transformers", "libp2p", "numpy", "quart", "sqlalchemy") == []


def loaded_by(module: str, *heavy: str) -> list[str]:
    code = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
