"""Which of the tensors that `forward` returns are exits.

Whatever it returns is walked to its tensors, each with the path a person would write behind the returned value:
`[0]`, `['early']`, `.logits[1]`. Exits are named by path, or proposed by shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TypeAlias

import torch
from offramp_contract.errors import TraceError

ExitNames: TypeAlias = Sequence[str] | Mapping[str, str]
"""Paths of the exits, in order; or the exits' names, each with its path."""

ADAPTER = (
    "Give it a forward that returns all exits, in order of depth:\n"
    "    class AllExits(YourNetwork):\n"
    "        def forward(self, x): ...; return [logits_0, logits_1, ...]  # each (batch, classes)"
)


def walk(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors in a nested list, tuple, dict or dataclass, each with its path, in order."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from walk(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from walk(item, f"{path}[{index}]")


def choose_exits(
    returned: object, batch: int, wanted: ExitNames | None, num_classes: int | None = None
) -> dict[str, str]:
    """Find the exits in what `forward` returned.

    Args:
        returned: The value itself.
        batch: Number of rows it was called with.
        wanted: Paths (`out[0]`, `['early']`, `.logits[1]`; a path to a list means all in it), or None to propose every
            float tensor of shape (batch, classes >= 2), in order.
        num_classes: The number of classes, if the labels say it; only tensors of that width are proposed.

    Returns:
        The path of each exit, by the exit's name, in order.

    Raises:
        TraceError: If a path leads nowhere or to no scores, or nothing (or no one thing) can be proposed.
    """
    found = dict(walk(returned))
    if wanted is None:
        return _numbered(_propose(found, batch, num_classes, returned))
    if isinstance(wanted, Mapping):
        named = {name: _lookup(found, path) for name, path in wanted.items()}
        chosen = {name: paths[0] for name, paths in named.items()}
    else:
        chosen = _numbered([path for one in wanted for path in _lookup(found, one)])
    for path in chosen.values():
        if not _is_scores(found[path], batch):
            raise TraceError(
                f"exit {path or 'out'!r} is {_spell(found[path])}; an exit's logits are floats of shape "
                f"(batch, classes >= 2), here with batch {batch}"
            )
    if not chosen:
        raise TraceError("exits: name at least one")
    return chosen


def describe(returned: object) -> str:
    """Write for a person which tensors a value holds, one a line."""
    lines = [f"    {path or 'out'}: {_spell(tensor)}" for path, tensor in walk(returned)]
    return "\n".join(lines) or f"    no tensor (it is a {type(returned).__name__})"


def _propose(found: Mapping[str, torch.Tensor], batch: int, num_classes: int | None, returned: object) -> list[str]:
    fitting = [
        path for path, tensor in found.items() if _is_scores(tensor, batch) and num_classes in (None, tensor.shape[1])
    ]
    if not fitting:
        raise TraceError(
            f"forward returns no float tensor of shape (batch, {num_classes or 'classes >= 2'}), "
            f"here with batch {batch}:\n"
            f"{describe(returned)}\n{ADAPTER}"
        )
    if len({found[path].shape[1] for path in fitting}) > 1:
        raise TraceError(
            "forward returns score-like tensors of different widths, and which are exits cannot be told by shape; "
            f"name them (exits=[{', '.join(map(repr, fitting))}]):\n{describe(returned)}"
        )
    return fitting


def _lookup(found: Mapping[str, torch.Tensor], wanted: str) -> list[str]:
    path = wanted.strip().removeprefix("out").removesuffix("[:]")
    spellings = (path, f"[{path!r}]", f".{path}", path.replace('"', "'"))
    for spelling in spellings:
        if spelling in found:
            return [spelling]
    prefixes = tuple(spelling + mark for spelling in spellings if spelling for mark in "[.")
    below = [other for other in found if other.startswith(prefixes)]
    if not below:
        known = ", ".join(path or "out" for path in found)
        raise TraceError(f"exit {wanted!r} is not in what forward returns; it returns {known or 'no tensor'}")
    return below


def _numbered(paths: Sequence[str]) -> dict[str, str]:
    return {f"exit_{index}": path for index, path in enumerate(paths)}


def _is_scores(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[0] == batch and tensor.shape[1] >= 2


def _spell(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
