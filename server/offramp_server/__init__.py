"""HTTP -> queue -> stage -> route. `Engine` is all of it without HTTP."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp_server.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    # Imported on use: reading the settings (`offramp serve --help`) needs no ONNX Runtime.
    if name == "Engine":
        from offramp_server.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
