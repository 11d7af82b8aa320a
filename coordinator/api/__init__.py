"""The HTTP side: OpenAI's endpoint over a `GenerationService`, and the operator's routes for models."""

from coordinator.api.app import ApiApp, create_app
from coordinator.api.server import serve_http
from coordinator.api.settings import ApiSettings
from coordinator.api.shards import ShardRoutes

__all__ = ["ApiApp", "ApiSettings", "ShardRoutes", "create_app", "serve_http"]
