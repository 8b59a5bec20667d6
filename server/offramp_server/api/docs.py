"""The documentation page: Swagger UI from the assets of an installed package, so that no third party is called."""

from pathlib import Path

import fastapi_offline
import orjson
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

_ASSETS = Path(fastapi_offline.__file__).parent / "static"


def routes() -> list[BaseRoute]:
    """Give the routes of the documentation."""
    return [
        Route("/openapi.json", _openapi, methods=["GET"]),
        Route("/docs", _page, methods=["GET"]),
        Mount("/docs/assets", StaticFiles(directory=_ASSETS)),
    ]


async def _openapi(request: Request) -> Response:
    return Response(orjson.dumps(request.app.openapi()), media_type="application/json")


async def _page(request: Request) -> Response:
    root = request.scope.get("root_path", "")
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="Offramp",
        swagger_js_url=f"{root}/docs/assets/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/assets/swagger-ui.css",
        swagger_favicon_url=f"{root}/docs/assets/favicon.png",
    )
