"""What an operator can set about the HTTP side."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ApiSettings"]


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Bounds and times of the OpenAI endpoint.

    Args:
        default_max_tokens: the length of an answer where the client names none, as far as the context allows.
        max_body_bytes: the largest request body; a context of 1M tokens is about 4 MiB of text.
        max_bodies_bytes: of all requests that are being read or turned into prompts, together.
        max_choices: the largest `n`; each choice is a job of its own.
        keep_alive_s: how long a stream may be silent before a comment keeps proxies from cutting it.
        body_timeout_s: how long a client may take to send its request.
        drain_s: how long the rest of a refused body is read, so that the client gets to see the refusal.
        uncovered_retry_s: Retry-After where no worker has a layer; a worker needs about that long to load some.
        busy_retry_s: Retry-After where all workers are busy, and it is not known for how long.
        cpu_threads: how many prompts are parsed and tokenised at once, off the event loop.
    """

    default_max_tokens: int = 1024
    max_body_bytes: int = 10 * 2**20
    max_bodies_bytes: int = 256 * 2**20
    max_choices: int = 8
    keep_alive_s: float = 10.0
    body_timeout_s: float = 60.0
    drain_s: float = 2.0
    uncovered_retry_s: int = 15
    busy_retry_s: int = 2
    cpu_threads: int = 2
