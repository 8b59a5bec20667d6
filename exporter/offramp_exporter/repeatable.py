"""A network that answers twice differently cannot be served in stages: what it is that changes, and on which line."""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Final

import torch
from offramp_contract.errors import TraceError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from offramp_exporter.exit_paths import ExitPath, walk
from offramp_exporter.refusal import is_users_code, spell_line

_SET: Final = (
    r"self\.{name}\b(\[[^\]]*\])?(\s*([-+*/@|&]|//|\*\*)?=[^=]|\.(append|extend|insert|update|add|pop|\w+_)\()"
)
_PLAIN: Final = (bool, int, float, str, type(None))

Memory = dict[tuple[int, str], tuple[nn.Module, object]]
"""What each attribute of each module holds, as far as it can be told apart later."""


def prove_repeatable(call: Callable[[], object], paths: Mapping[str, ExitPath], network: nn.Module) -> None:
    """Call a network twice with the same input.

    Args:
        call: Calls it, and gives what `forward` returned.
        paths: Its exits.
        network: It, to see what it remembers.

    Raises:
        TraceError: If its exits differ, naming the line that draws random numbers or changes what it remembers.
    """
    before = _memory(network)
    with DrawnNumbers() as drawn:
        first = _exits(call(), paths, network)
    between = _memory(network)
    second = _exits(call(), paths, network)
    if first.keys() == second.keys() and all(_equal(tensor, second[name]) for name, tensor in first.items()):
        return
    if drawn.lines:
        raise TraceError(random_numbers(drawn.lines[0]))
    changed = _changed(before, between) or _changed(between, _memory(network))
    raise TraceError(
        f"the network answers differently when it is called twice with the same input{_blamed(changed)}; "
        "let forward compute its exits from its input and weights alone"
    )


def random_numbers(line: str | None) -> str:
    """Write the refusal of a network that draws random numbers."""
    return (
        f"forward draws random numbers at inference{f' at {line}' if line else ''}, so no two answers would agree; "
        "in eval() leave dropout and noise out (training=self.training) and take the likeliest (argmax, p > 0.5) "
        "instead of a sample"
    )


class DrawnNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the user's lines that draw random numbers.

    Attributes:
        lines: Them, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        del types
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.lines.extend(_users_line())
        return func(*args, **(kwargs or {}))


def _users_line() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        if is_users_code(frame.f_code.co_filename):
            yield spell_line(frame.f_code.co_filename, frame.f_lineno)
            return
        frame = frame.f_back  # type: ignore[assignment]


@contextmanager
def restored(network: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Undo afterwards what a network notes down in attributes, lists and dicts: under tracing, no true tensors.

    Args:
        network: It.
        modules: All that are reachable from it, for who knows them already.
    """
    held = [vars(module) for module in (reachable(network) if modules is None else modules)]
    saved: list[tuple[Any, Any]] = [(attributes, dict(attributes)) for attributes in held]
    saved += [(value, value.copy()) for attributes in held for value in attributes.values() if _is_container(value)]
    try:
        yield
    finally:
        for value, before in saved:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def _is_container(value: object) -> bool:
    return isinstance(value, list | dict | set)


def reachable(value: object, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """Give every module that hangs on a value, those in plain lists and dicts included."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        yield value
        for held in (*value.children(), *vars(value).values()):
            yield from reachable(held, seen)
    elif isinstance(value, list | tuple | dict):
        seen.add(id(value))
        for held in value.values() if isinstance(value, dict) else value:
            yield from reachable(held, seen)


def _exits(returned: object, paths: Mapping[str, ExitPath], network: object) -> dict[str, torch.Tensor]:
    """Give the exits by name, and a place for everything else, so that a list that grows is seen."""
    others = {str(path): torch.empty(0) for path, _ in walk(returned)}
    # Cloned: an in-place counter would change the first answer together with the second.
    return others | {name: path.find(returned, network).clone() for name, path in paths.items()}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def _memory(network: nn.Module) -> Memory:
    held: Memory = {}
    for module in reachable(network):
        own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        for name, value in {**own, **module._buffers, **module._parameters}.items():
            held[id(module), name] = module, _mark(value)
    return held


def _mark(value: object) -> object:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return torch.Tensor, id(value), value._version
    return len(value) if isinstance(value, list | tuple | dict | set) else None


def _changed(before: Memory, after: Memory) -> list[tuple[nn.Module, str]]:
    """Name what has changed, numbers and lists before tensors, which may be no more than a place for an output."""
    changed = [
        (isinstance(mark, tuple), module, key[1])
        for key, (module, mark) in after.items()
        if key in before and before[key][1] != mark
    ]
    return [(module, name) for _, module, name in sorted(changed, key=lambda one: one[0])]


def _blamed(changed: list[tuple[nn.Module, str]]) -> str:
    if not changed:
        return ", although nothing that it holds has changed"
    module, name = changed[0]
    line = _line_that_sets(type(module), name)
    return f": {type(module).__name__}.{name} changes between calls{f' at {line}' if line else ''}"


def _line_that_sets(kind: type, name: str) -> str | None:
    pattern = re.compile(_SET.format(name=re.escape(name)))
    methods = [
        method
        for base in kind.__mro__
        for method in vars(base).values()
        if isinstance(method, FunctionType)
        and method.__name__ != "__init__"
        and is_users_code(method.__code__.co_filename)
    ]
    for method in methods:
        try:
            lines, start = inspect.getsourcelines(method)
        except OSError:
            continue
        for offset, line in enumerate(lines):
            if pattern.search(line):
                return spell_line(method.__code__.co_filename, start + offset)
    return None
