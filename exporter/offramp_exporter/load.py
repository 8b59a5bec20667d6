"""What a command line names: a module factory, and the weights that belong to it."""

import importlib
import sys
from pathlib import Path

import torch
from offramp_contract.errors import TraceError
from torch import nn


def load_module(target: str, weights: Path | None = None) -> nn.Module:
    """Make the module that a user names, with their weights.

    Args:
        target: `package.module:factory`; the factory is a class or function without required arguments, or a module
            itself. Imported with the current folder first on the path, so that the user's own packages are found.
        weights: A file that `torch.save(module.state_dict(), ...)` wrote; nothing in it is executed.

    Raises:
        TraceError: If it cannot be imported or made, or the weights do not fit, saying which.
    """
    module = _make(target)
    if weights is not None:
        load_weights(module, weights)
    return module.eval()


def _make(target: str) -> nn.Module:
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise TraceError(f"{target!r} names no network; write package.module:factory, such as models.resnet:build")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except ModuleNotFoundError as error:
        raise TraceError(
            f"{target!r}: there is no module {error.name!r}, seen from {Path.cwd()} and the installed packages"
        ) from error
    except AttributeError as error:
        raise TraceError(f"{target!r}: module {module_name!r} has no {attribute!r}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    return _called(target, factory)


def _called(target: str, factory: object) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise TraceError(f"{target!r} is no class, function or module")
    try:
        made = factory()
    except TypeError as error:
        raise TraceError(f"{target!r} cannot be called without arguments: {error}; write a factory that can") from error
    if not isinstance(made, nn.Module):
        raise TraceError(f"{target!r} gives a {type(made).__name__}, no torch.nn.Module")
    return made


def load_weights(module: nn.Module, weights: Path) -> None:
    """Put the weights of a file into a module.

    Args:
        module: Gets them in place.
        weights: A file that `torch.save(module.state_dict(), ...)` wrote; nothing in it is executed.

    Raises:
        TraceError: If they do not fit, saying which.
    """
    if not weights.is_file():
        raise TraceError(f"weights: {str(weights)!r} is no file")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails anywhere in torch's reader
        raise TraceError(
            f"weights: {weights.name!r} holds no plain state_dict; save it with torch.save(net.state_dict(), path)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise TraceError(f"weights: {weights.name!r} holds a {type(state).__name__}, no state_dict")
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        mismatch = str(error).splitlines()[-1].strip()
        raise TraceError(f"weights: {weights.name!r} does not fit {type(module).__name__}: {mismatch}") from error
    if missing or unexpected:
        problem = f"lacks {_few(missing)}" if missing else f"holds {_few(unexpected)}, which the network has not"
        raise TraceError(f"weights: {weights.name!r} does not fit {type(module).__name__}: it {problem}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
