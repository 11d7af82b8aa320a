"""The fields that messages and signed documents share, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["MAX_PART", "MAX_TOKENS", "Code", "Count", "Epoch", "JobId", "Part", "Text", "TokenId"]

# The longest context of any published model is 10M tokens (Llama 4 Scout); ids of 1M are 4 MiB, enough for one job.
MAX_TOKENS = 1_048_576
# Streams beyond the first that a stage may offer the next one in a job. One is enough to leave a relay, but a direct
# connection that breaks at once may take some tries.
MAX_PART = 8

Count = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Part = Annotated[int, Field(ge=0, le=MAX_PART)]
Epoch = Annotated[int, Field(ge=0, le=2**31)]
JobId = Annotated[bytes, Field(min_length=16, max_length=16)]
Text = Annotated[str, Field(max_length=2_000)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
