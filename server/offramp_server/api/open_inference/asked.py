"""Finds the model that a path under `/v2` names."""

from starlette.requests import Request

from offramp_server.context import context_of
from offramp_server.served import ServedModel


def asked_model(request: Request) -> ServedModel:
    """Give the model, and version, that a request's path names.

    Raises:
        UnknownModel: If there is no such model or version.
        NotReady: If the model is there but cannot be served (yet).
    """
    repository, name = context_of(request).repository, request.path_params["model"]
    version = request.path_params.get("version")
    served = repository.find(name)
    is_served = version in (None, served.version, version_number(served))
    return served if is_served else repository.find(name, version)


def version_number(served: ServedModel) -> str:
    """Spell a model's version as the decimal number that Triton's tools take any version for."""
    return str(int(served.version, 16))
