"""A request's jobs as they are noted in the journal, and back. Pure."""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import partial

from azu.accounts.kept import KeptRequests
from azu.wire.tokens import pack_tokens, unpack_tokens
from coordinator.api.jobs import ChatJob
from coordinator.api.kept import Kept
from coordinator.chat import ChatFormat
from coordinator.generation import GenerationRequest, ServedModel
from coordinator.journal import Asked, Kind, Unfinished

__all__ = ["kept_job", "taken_up_job"]


def kept_job(journal: KeptRequests, job: ChatJob, kind: Kind, *, created: int, include_usage: bool = False) -> ChatJob:
    """The job, so that it is noted while it runs."""
    first = job.requests[0]  # choices differ by id and sampling alone
    asked = Asked(
        request_id=secrets.token_hex(16),
        kind=kind,
        created=created,
        model_id=job.model.model_id,
        manifest=job.model.manifest.digest,
        prompt=pack_tokens(first.prompt),
        max_tokens=first.max_tokens,
        stop_tokens=first.stop_tokens,
        job_ids=tuple(each.job_id for each in job.requests),
        samplings=tuple(each.sampling for each in job.requests),
        stops=job.stops,
        include_usage=include_usage,
        account=first.account,
        wallet=first.wallet,
        key_id=first.key_id,
    )
    return _noted(job, Kept(journal, asked))


def taken_up_job(journal: KeptRequests, unfinished: Unfinished, model: ServedModel, chat: ChatFormat) -> ChatJob:
    """The job of a request that was claimed."""
    asked, kept = unfinished.asked, Kept.of(journal, unfinished)
    prompt = unpack_tokens(asked.prompt)
    requests = tuple(
        GenerationRequest(
            model=model,
            prompt=prompt,
            max_tokens=asked.max_tokens,
            sampling=sampling,
            stop_tokens=asked.stop_tokens,
            account=asked.account,
            wallet=asked.wallet,
            key_id=asked.key_id,
            job_id=job_id,
            first_chain=kept.first_chain,
        )
        for job_id, sampling in zip(asked.job_ids, asked.samplings, strict=True)
    )
    return _noted(ChatJob(model, chat, requests, asked.stops), kept)


def _noted(job: ChatJob, kept: Kept) -> ChatJob:
    requests = (
        replace(each, note=partial(kept.note, number), leads=kept.leads) for number, each in enumerate(job.requests)
    )
    return replace(job, requests=tuple(requests), kept=kept)
