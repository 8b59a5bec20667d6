"""How `forward` is run, traced or not: what it says of devices and `.data` means what it would mean where we are."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class ForwardMode(TorchFunctionMode):
    """Keeps tensors on one device, and takes `.data` for `.detach()`.

    A network that says `.cuda()` in its `forward` computes the same numbers on a CPU; where a tensor lies changes no
    value. `.data` cannot be traced, and reads as `.detach()` does.

    Args:
        home: Where the network's parameters are.
    """

    def __init__(self, home: torch.device) -> None:
        super().__init__()
        self._home = home

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer one call to torch."""
        del types
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == torch.Tensor.cuda:
            return args[0].to(self._home)
        return func(*map(self._here, args), **{name: self._here(value) for name, value in (kwargs or {}).items()})

    def _here(self, value: Any) -> Any:
        """Replace an accelerator by the home device, `torch.cuda.FloatTensor` by `torch.FloatTensor`."""
        if isinstance(value, torch.device):
            return value if value.type in ("cpu", "meta", self._home.type) else self._home
        if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
            return value if self._home.type == "cuda" else self._home
        if isinstance(value, str) and value.startswith("torch.cuda.") and self._home.type != "cuda":
            return value.replace("torch.cuda.", "torch.")
        return value


def home_of(module: nn.Module) -> torch.device:
    """Give the device that holds a network's parameters."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@contextmanager
def plain_calls() -> Iterator[None]:
    """Let modules be called as ever: the tracer's own way of calling them loses count when one of them throws."""
    traced = nn.Module.__call__
    nn.Module.__call__ = nn.Module._wrapped_call_impl  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = traced  # type: ignore[method-assign]
