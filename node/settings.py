"""The settings of what only looks at a worker's data folder."""

from __future__ import annotations

from pydantic import Field

from azu.config import NODE_DIR, BaseAzuSettings
from azu.setting_types import Folder, JobIdText, cli

__all__ = ["EarningsSettings", "StatusSettings"]


class StatusSettings(BaseAzuSettings):
    """A look at the worker that runs on a data folder."""

    data_dir: Folder = Field(
        default=NODE_DIR,
        description="The worker's data folder, as given to `azu-node join`.",
        json_schema_extra=cli(metavar="FOLDER"),
    )
    as_json: bool = Field(
        default=False,
        description="Print one JSON document: sizes in bytes, times in seconds, sums instead of means.",
        json_schema_extra=cli(option="--json"),
    )


class EarningsSettings(StatusSettings):
    """A look at what a worker has earned."""

    as_json: bool = Field(
        default=False,
        description="Print one JSON document, with times in unix seconds.",
        json_schema_extra=cli(option="--json"),
    )
    jobs: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="List so many of the last jobs, too.",
        json_schema_extra=cli(metavar="NUMBER"),
    )
    proof: JobIdText | None = Field(
        default=None,
        description="Print what proves a job instead, as JSON: its ticket as the coordinator signed it, and this "
        "worker's receipt.",
        json_schema_extra=cli(metavar="JOB_ID"),
    )
