"""`azu-node leave`: have the worker that runs on a data folder hand its jobs over, and wait until it has ended."""

from __future__ import annotations

import os
import signal
import time

import click

from azu.datadir import is_in_use
from azu.errors import NetworkError
from node.settings import LeaveSettings
from node.status import fetch_status

__all__ = ["leave"]

_LOOK_S = 0.2


def leave(settings: LeaveSettings) -> None:
    """Returns once the worker's process has ended.

    Raises:
        NetworkError: none runs on the folder (code "not_running"), it does not answer ("no_answer"), or it is another
            user's or in another container ("not_ours").
    """
    status = fetch_status(settings.data_dir)
    if not status["leaving"]:  # a second signal would end it at once
        _ask(int(status["pid"]))
    told: int | None = None
    while is_in_use(settings.data_dir):
        if (running := _jobs(settings)) not in (told, None):
            told = running
            click.echo(f"{running} jobs run on it until others have taken them over")
        time.sleep(_LOOK_S)
    click.echo("it has left")


def _ask(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        raise NetworkError(
            f"the worker's process {pid} cannot be signalled: {error.strerror}",
            code="not_ours",
            remedy="Run this as the worker's user, and in its container if it has one",
        ) from error


def _jobs(settings: LeaveSettings) -> int | None:
    """How many run; None where it does not say any more."""
    try:
        return int(fetch_status(settings.data_dir)["jobs"]["running"])
    except NetworkError:
        return None
