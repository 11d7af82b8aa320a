"""The coordinator's HTTP application: OpenAI's routes, and every error in OpenAI's shape."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart import Request, Response, json, request
from quart.asgi import ASGIHTTPConnection
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException

from azu.accounts.kept import KeptRequests
from azu.accounts.presence import Presence
from coordinator.api.auth import Gate
from coordinator.api.completions import Completions, find_model
from coordinator.api.errors import ApiError, from_exception, from_http_exception
from coordinator.api.jobs import InFlight
from coordinator.api.kept import Unclaimed
from coordinator.api.money import Money, add_money_routes
from coordinator.api.responses import health_object, model_object
from coordinator.api.settings import ApiSettings
from coordinator.api.shards import ShardRoutes
from coordinator.api.submit import Submissions
from coordinator.generation import GenerationService

__all__ = ["ApiApp", "create_app"]

# The nursery of the connection that a handler's task serves.
_nursery: ContextVar[trio.Nursery] = ContextVar("azu_connection_nursery")


class _Connection(TrioASGIHTTPConnection):
    """Shows a handler the nursery that quart-trio runs it in, and cancels when the client hangs up.

    Hypercorn says "disconnect" at the end of every response too, in the middle of its own clean-up. quart-trio's
    connection cancels that: the TCP connection is then neither closed when the server stops nor ever idle.
    """

    _complete = False

    async def handle_messages(  # type: ignore[override]  # quart-trio's own signature, which differs from Quart's
        self, nursery: trio.Nursery, request: Request, receive: ASGIReceiveCallable
    ) -> None:
        await ASGIHTTPConnection.handle_messages(self, request, receive)
        if not self._complete:
            nursery.cancel_scope.cancel()

    async def handle_request(  # type: ignore[override]
        self, nursery: trio.Nursery, request: Request, send: ASGISendCallable
    ) -> None:
        async def watched(event: ASGISendEvent) -> None:
            if event["type"] == "http.response.body" and not event.get("more_body"):
                self._complete = True
            await send(event)

        _nursery.set(nursery)
        await super().handle_request(nursery, request, watched)


class ApiApp(QuartTrio):
    """A Quart application that knows which jobs it runs."""

    asgi_http_class = _Connection

    def __init__(self, import_name: str) -> None:
        super().__init__(import_name, static_folder=None)
        self.in_flight = InFlight()
        self.submissions: Submissions | None = None
        self.unclaimed: Unclaimed | None = None
        self.presence: Presence | None = None
        self.url = ""  # where it listens, once it does
        self.url_map.strict_slashes = False
        self.json.sort_keys = False  # type: ignore[attr-defined]  # the default provider's
        # Answers take as long as they take; `Bodies` has its own limits of size and time.
        self.config |= {"RESPONSE_TIMEOUT": None, "BODY_TIMEOUT": None, "MAX_CONTENT_LENGTH": None}


def create_app(
    service: GenerationService,
    settings: ApiSettings,
    shards: ShardRoutes | None = None,
    money: Money | None = None,
    presence: Presence | None = None,
) -> ApiApp:
    """The application over a generation service; serve it with `serve_http`.

    Without `shards` it cuts no models. Without `money` there are no accounts, use is free and not counted, and nothing
    outlives a restart. `presence` is of the money's ledger.
    """
    app = ApiApp(__name__)
    gate = Gate() if money is None else money.gate()
    till = None if money is None else money.till()
    journal = None
    if money is not None:
        app.presence = presence or Presence(money.ledger)
        journal = KeptRequests(money.ledger, app.presence)
    completions = Completions(service, settings, app.in_flight, gate, till, journal)
    app.unclaimed = completions.unclaimed
    _add_error_handlers(app, settings)
    _add_routes(app, service, completions, gate)
    if shards is not None:
        _add_shard_routes(app, shards)
    if money is not None and journal is not None:
        app.submissions = add_money_routes(app, money, gate, completions, service, journal, lambda: app.url)

    @app.after_request
    async def add_request_id(response: Response) -> Response:
        response.headers["x-request-id"] = f"req_{secrets.token_hex(12)}"
        return response

    return app


def _add_routes(app: ApiApp, service: GenerationService, completions: Completions, gate: Gate) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response | dict[str, Any]:
        return await completions.answer(request, _nursery.get())

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        await gate.admit(request, None)
        return {"object": "list", "data": [model_object(model) for model in service.models()]}

    @app.get("/v1/models/<path:model_id>")
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        await gate.admit(request, None)
        return model_object(find_model(service, model_id))

    @app.get("/healthz")
    async def healthz() -> tuple[dict[str, Any], int]:
        models = service.health()
        able = any(model.covered for model in models)
        body = {"status": "ok" if able else "degraded", "models": [health_object(model) for model in models]}
        return body, HTTPStatus.OK if able else HTTPStatus.SERVICE_UNAVAILABLE


def _add_shard_routes(app: ApiApp, shards: ShardRoutes) -> None:
    @app.post("/models/shard")
    async def shard_model() -> tuple[dict[str, Any], int]:
        return await shards.submit(request), HTTPStatus.ACCEPTED

    @app.get("/models/status")
    async def shard_status() -> dict[str, Any]:
        return shards.status(request.args.get("model_id", ""))


def _add_error_handlers(app: ApiApp, settings: ApiSettings) -> None:
    @app.errorhandler(HTTPException)
    async def on_http_exception(error: HTTPException) -> Response:
        return _error_response(from_http_exception(error, request.method, request.path[:300]))

    @app.errorhandler(Exception)
    async def on_exception(error: Exception) -> Response:
        return _error_response(from_exception(error, settings))


def _error_response(error: ApiError) -> Response:
    return Response(
        json.dumps(error.body()), status=error.status, headers=error.headers, content_type="application/json"
    )
