"""The OpenAI endpoint: requests checked, run by a `GenerationService`, answered whole or as a stream."""

from coordinator.api.app import ApiApp, create_app
from coordinator.api.server import serve_http
from coordinator.api.settings import ApiSettings

__all__ = ["ApiApp", "ApiSettings", "create_app", "serve_http"]
