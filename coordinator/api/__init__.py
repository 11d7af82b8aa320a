"""The HTTP side: OpenAI's endpoint over a `GenerationService`, and the operator's routes for models."""

from coordinator.api.app import ApiApp, create_app
from coordinator.api.auth import AuthMode, auth_mode
from coordinator.api.money import Money
from coordinator.api.server import serve_http
from coordinator.api.settings import ApiSettings
from coordinator.api.shards import ShardRoutes

__all__ = ["ApiApp", "ApiSettings", "AuthMode", "Money", "ShardRoutes", "auth_mode", "create_app", "serve_http"]
