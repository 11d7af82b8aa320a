"""What can go wrong with a model's source file while it is read."""

from __future__ import annotations

from pathlib import Path

from azu.errors import InputError

__all__ = ["source_changed", "unreadable_source"]


def unreadable_source(path: Path, error: OSError) -> InputError:
    """The system does not give the file's bytes."""
    return InputError(f"{path} cannot be read ({error.strerror})", code="unreadable_source")


def source_changed(path: Path) -> InputError:
    """The file is not what it was when the model began to be cut."""
    remedy = "Run it again when nothing writes to it any more."
    return InputError(f"{path} was changed while it was cut", code="source_changed", remedy=remedy)
