"""One request for a file on the hub, and when to make it once more: what all that fetches from there has in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import httpx2  # what huggingface_hub 2 speaks HTTP with
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but exported lazily

__all__ = ["Retries", "request_file"]

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


def request_file(
    repo_id: str, name: str, commit: str, byte_range: str = "", *, token: bool | None = None
) -> AbstractContextManager[httpx2.Response]:
    """Asks for a file, or for a range of it such as "0-7"; its status is for the caller to judge.

    Read the body with `iter_raw`: decoded, a few bytes could become gigabytes.

    Args:
        token: False sends none; otherwise huggingface_hub's own rules hold.
    """
    headers = {**build_hf_headers(token=token, library_name="azu"), "Accept-Encoding": "identity"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range}"
    url = hf_hub_url(repo_id, name, revision=commit)
    return get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)


class Retries:
    """The pauses in seconds before a broken transfer is taken up again; they begin anew whenever a byte has come."""

    def __init__(self, pauses: Sequence[float]) -> None:
        self._pauses = pauses
        self._tries = 0

    def pause(self, error: Exception, *, moved: bool) -> None:
        """Wait after a failure, or raise it where it is lasting or the pauses are used up."""
        self._tries = 0 if moved else self._tries
        lasting = isinstance(error, HfHubHTTPError) and error.response.status_code not in _TRANSIENT_STATUS
        if lasting or self._tries == len(self._pauses):
            raise error
        time.sleep(self._pauses[self._tries])
        self._tries += 1
