"""`/v2`: the Open Inference Protocol with the extensions that existing clients use, on the same engine as `/v1`.

`request` reads what a client sends, `tensors` codes tensors, `plan` checks the words, `infer` answers, `shortcut`
answers the common case without the framework, `outputs` and `response` write the answer; `metadata` describes the
server and its models, `control` is the repository extension.
"""

from starlette.routing import Route

from offramp_server.api.open_inference import control, infer, metadata
from offramp_server.api.open_inference.openapi import openapi_paths
from offramp_server.api.open_inference.shortcut import InferShortcut

__all__ = ["InferShortcut", "openapi_paths", "routes"]


def routes() -> list[Route]:
    """Give the routes under `/v2`."""
    return [*metadata.routes(), *infer.routes(), *control.routes()]
