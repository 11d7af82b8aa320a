"""POST /models/shard and GET /models/status: cutting models into layers while the coordinator runs.

Cutting fills the disk, so it takes the operator's token; and it takes hub ids only, so that nobody chooses a path.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from quart import Request

from azu.errors import AzuError, InternalError
from azu.models.source import HUB_ID
from coordinator.api.bodies import Bodies
from coordinator.api.errors import ApiError
from coordinator.api.requests import parse_object
from coordinator.api.settings import ApiSettings
from coordinator.generation import ServedModel
from coordinator.shards import ShardQueue, ShardStatus

__all__ = ["ShardRoutes", "shard_object"]

_MAX_BODY_BYTES = 65_536
_MAX_SHOWN = 300  # characters of a model's id in an error


class ShardRoutes:
    """What the routes do; one for the app.

    Args:
        models: what is served now.
        is_listed: whether the model with this manifest's digest is served, or is about to be.
        token: what a client has to show.
    """

    def __init__(
        self,
        queue: ShardQueue,
        models: Callable[[], Sequence[ServedModel]],
        is_listed: Callable[[str], bool],
        token: str,
    ) -> None:
        self._queue = queue
        self._models = models
        self._is_listed = is_listed
        self._token = token.encode()
        self._bodies = Bodies(replace(ApiSettings(), max_body_bytes=_MAX_BODY_BYTES))

    async def submit(self, request: Request) -> dict[str, Any]:
        """Queue a model.

        Raises:
            ApiError: status 401 without the token, 400 for anything but a hub id.
            CapacityError: too many wait.
        """
        self._authorize(request)
        with self._bodies.lease() as lease:
            body = parse_object(await self._bodies.read(request, lease))
        return shard_object(self._queue.submit(_hub_id(body)))

    def status(self, model_id: str) -> dict[str, Any]:
        """Where a model's cutting stands; one that is served counts as ready, and one that was removed as unknown.

        Raises:
            ApiError: status 400 without a model id, 404 where there is no such model.
        """
        if not model_id:
            raise _missing()
        found = self._queue.status(model_id)
        if found is not None and found.manifest is not None and not self._is_listed(found.manifest.digest):
            found = None  # it was removed since, or another revision took its place
        if found is None:
            served = (model.manifest for model in self._models() if model.model_id == model_id)
            found = next((ShardStatus(model_id, "ready", manifest=manifest) for manifest in served), None)
        if found is None:
            raise ApiError(
                f"The model '{model_id[:_MAX_SHOWN]}' was not asked for here",
                status=404,
                code="model_not_found",
                param="model_id",
                remedy="Send it to POST /models/shard first, and ask with the same model_id.",
            )
        return shard_object(found)

    def _authorize(self, request: Request) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        # Compared as bytes, in a time that does not depend on where they differ.
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
            raise ApiError(
                "This needs the coordinator's admin token",
                status=401,
                code="admin_token_required",
                remedy="Send the header Authorization: Bearer TOKEN; the coordinator's operator has it.",
                headers={"WWW-Authenticate": "Bearer"},
            )


def shard_object(status: ShardStatus) -> dict[str, Any]:
    """A status as JSON; `done`, `total` and `rate` are bytes and bytes per second, but files while cutting."""
    progress, manifest = status.progress, status.manifest
    return {
        "object": "shard",
        "model_id": status.model_id,
        "state": status.state,
        "item": progress.item if progress else None,
        "done": progress.done if progress else None,
        "total": progress.total if progress else None,
        "rate": None if status.rate is None else round(status.rate),
        "revision": manifest.revision if manifest else None,
        "manifest": manifest.digest if manifest else None,
        "layers": manifest.n_layers if manifest else None,
        "bytes": sum(blob.size for blob in manifest.blobs()) if manifest else None,
        "error": _error_object(status.error) if status.error else None,
    }


def _error_object(error: AzuError) -> dict[str, str]:
    if isinstance(error, InternalError):  # it may name folders of this machine
        remedy = "The coordinator's log says why."
        return {"code": error.code, "message": "The coordinator failed to store or cut the model", "remedy": remedy}
    return {"code": error.code, "message": error.message, "remedy": error.remedy}


def _hub_id(body: dict[str, Any]) -> str:
    model_id = body.pop("model_id", None)
    if body:
        name = next(iter(body))[:64]
        raise ApiError(f"Unknown parameter: '{name}'", code="unknown_parameter", param=name, remedy="Leave it out.")
    if model_id is None:
        raise _missing()
    if not isinstance(model_id, str):
        raise ApiError("Invalid type for 'model_id': it is no string", code="invalid_type", param="model_id")
    if HUB_ID.fullmatch(model_id) is None:
        raise ApiError(
            f"Invalid 'model_id': '{model_id[:_MAX_SHOWN]}' is no hub id",
            code="invalid_value",
            param="model_id",
            remedy="Send owner/name or owner/name@revision. Folders and files are for `azu-coordinator shard`.",
        )
    return model_id


def _missing() -> ApiError:
    problem = "Missing required parameter: 'model_id'"
    return ApiError(problem, code="missing_required_parameter", param="model_id")
