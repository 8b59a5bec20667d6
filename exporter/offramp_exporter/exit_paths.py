"""How a person writes where an exit lies: `out[0]`, `out.logits[:]`, `out[:][1]`, `stack(out, dim=1)`, `log(out[2])`.

A path starts at what `forward` returned (`out`) or at the network (`self.early.scores`, an attribute that `forward`
sets) and goes on as Python would: keys, fields, slices. A slice stands for all it holds, and `stack` for all slices of
one tensor. `log` says that an exit gives probabilities. Names that start with two underscores are Python's own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Final, Literal, TypeAlias

import torch
from offramp_contract.errors import TraceError
from offramp_contract.policy_spec import MAX_EXITS

FINAL_FIRST: Final = "final-first"
"""The word that says: the first exit of all is the deepest."""

_MAX_LETTERS: Final = 1000
_MAX_DEPTH: Final = 64
_NOWHERE: Final = (LookupError, AttributeError, TypeError, ValueError, RuntimeError)
"""What Python and torch raise where a step leads nowhere."""

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""
_STEP: Final = re.compile(
    r"\.(?P<field>(?!__)[A-Za-z_]\w*)"
    r"|\[\s*(?P<index>-?\d+)\s*\]"
    r"|\[\s*(?P<quote>['\"])(?P<key>.*?)(?P=quote)\s*\]"
    r"|\[\s*(?P<start>-?\d*)\s*:\s*(?P<stop>-?\d*)\s*\]"
    r"|\[\s*:\s*,\s*(?P<column>-?\d+)\s*\]"
)
_CALL: Final = re.compile(r"(?P<name>log|stack)\((?P<inside>.*)\)$", re.DOTALL)
_STACK: Final = re.compile(r"(?P<path>.*?)(?:,\s*(?:dim\s*=\s*)?(?P<dim>-?\d+)\s*)?$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Field:
    """`.name`: an attribute, or a mapping's key."""

    name: str

    def __str__(self) -> str:
        return f".{self.name}"


@dataclass(frozen=True, slots=True)
class Key:
    """`[0]`, `['early']`: an item; of a tensor, a slice on axis 0."""

    key: int | str

    def __str__(self) -> str:
        return f"[{self.key!r}]"


@dataclass(frozen=True, slots=True)
class Column:
    """`[:, 1]`: a slice of a tensor on axis 1."""

    index: int

    def __str__(self) -> str:
        return f"[:, {self.index}]"


@dataclass(frozen=True, slots=True)
class Every:
    """`[:]`, `[1:]`: all items in a range; `dim` is the axis of a tensor."""

    start: int | None = None
    stop: int | None = None
    dim: int = 0


Step: TypeAlias = Field | Key | Column | Every


@dataclass(frozen=True, slots=True)
class ExitPath:
    """Where a tensor lies.

    Attributes:
        steps: From the root on.
        root: What `forward` returned, or the network itself.
        is_probability: Whether it holds probabilities, so that their logarithm is the exit's logits.
    """

    steps: tuple[Step, ...] = ()
    root: Literal["out", "self"] = "out"
    is_probability: bool = False

    def __str__(self) -> str:
        path = self.root + "".join(map(str, self.steps))
        return f"log({path})" if self.is_probability else path

    def then(self, step: Step) -> "ExitPath":
        """Give the path one step further."""
        return replace(self, steps=(*self.steps, step))

    def find(self, returned: object, network: object) -> torch.Tensor:
        """Give the exit's logits."""
        value = returned if self.root == "out" else network
        for step in self.steps:
            value = take(value, step)
        if not isinstance(value, torch.Tensor):
            raise TraceError(f"exit {str(self)!r} is a {type(value).__name__}, no tensor")
        # A probability that has rounded to 0 stays a number: the smallest that float32 holds.
        return value.clamp_min(torch.finfo(torch.float32).tiny).log() if self.is_probability else value


def take(value: object, step: Step) -> object:
    """Go one step, as Python would, and raise as it would where there is nothing."""
    match step:
        case Field(name):
            return value[name] if isinstance(value, Mapping) and name in value else getattr(value, name)
        case Key(key):
            if isinstance(value, torch.Tensor) and isinstance(key, int):
                return value.select(0, key)
            return value[key]  # type: ignore[index]
        case Column(index):
            if isinstance(value, torch.Tensor):
                return value.select(1, index)
    raise TypeError(f"{step} leads into no {type(value).__name__}")


def walk(
    value: object, path: ExitPath | None = None, around: tuple[object, ...] = ()
) -> Iterator[tuple[ExitPath, torch.Tensor]]:
    """Give the tensors in a nested list, tuple, dict or dataclass, each with its path, in order.

    Args:
        value: The outermost one.
        path: Where it lies.
        around: What it lies in: what holds itself is entered once, and what lies too deep not at all.
    """
    path = path or ExitPath()
    if isinstance(value, torch.Tensor):
        yield path, value
    elif len(around) < _MAX_DEPTH and not any(value is outer for outer in around):
        for step, held in items(value):
            yield from walk(held, path.then(step), (*around, value))


def items(value: object) -> list[tuple[Step, object]]:
    """Give what a list, tuple, dict or dataclass holds, each with the step to it."""
    if is_dataclass(value) and not isinstance(value, type):
        return [(Field(field.name), getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, Mapping):
        return [(Key(key), held) for key, held in value.items()]
    if isinstance(value, list | tuple):
        return [(Key(index), held) for index, held in enumerate(value)]
    return []


def find_all(wanted: str, returned: object, network: object) -> list[ExitPath]:
    """Find the tensors that a written path means.

    Args:
        wanted: The path; a path to a list, dict or dataclass means all tensors in it.
        returned: What `forward` returned.
        network: The network.

    Raises:
        TraceError: If it cannot be read, leads nowhere, or means more tensors than a network has exits.
    """
    path = read_path(wanted, returned)
    start = replace(path, steps=())
    root = returned if path.root == "out" else network
    try:
        found = list(islice(_expand(root, path.steps, start), MAX_EXITS + 1))
    except _NOWHERE:
        found = []
    if len(found) > MAX_EXITS:
        raise TraceError(f"exit {wanted!r} means over {MAX_EXITS} tensors, which is more than a network has exits")
    if not found:
        known = ", ".join(str(other) for other, _ in walk(returned)) or "no tensor"
        raise TraceError(f"exit {wanted!r} is not in what forward returns; it returns {known}")
    return found


def _expand(value: object, steps: Sequence[Step], path: ExitPath) -> Iterator[ExitPath]:
    if not steps:
        yield from (deeper for deeper, _ in walk(value, path))
        return
    step, rest = steps[0], steps[1:]
    if not isinstance(step, Every):
        yield from _expand(take(value, step), rest, path.then(step))
        return
    for each, held in _every(value, step):
        yield from _expand(held, rest, path.then(each))


def _every(value: object, step: Every) -> list[tuple[Step, object]]:
    span = slice(step.start, step.stop)
    if not isinstance(value, torch.Tensor):
        if step.dim:
            raise TypeError("only a tensor has axes")
        return items(value)[span]
    dim = range(value.ndim)[step.dim]
    if dim > 1:
        raise TypeError("exits are stacked on axis 0 or 1")
    slices: list[Step] = [Column(i) if dim else Key(i) for i in range(value.shape[dim])[span]]
    return [(each, take(value, each)) for each in slices]


def read_path(wanted: str, returned: object = None) -> ExitPath:
    """Read a written path. A bare word is a key or field of what `forward` returned.

    Raises:
        TraceError: If it is none, saying how paths are written.
    """
    text = wanted.strip()
    if len(text) > _MAX_LETTERS:
        raise TraceError(f"exit {text[:60]!r}... is longer than {_MAX_LETTERS} letters; name each exit by a path")
    if isinstance(returned, Mapping) and text in returned:
        return ExitPath((Key(text),))
    call = _CALL.match(text)
    if call is not None and call["name"] == "log":
        return replace(read_path(call["inside"], returned), is_probability=True)
    if call is not None:
        stacked = _STACK.match(call["inside"])
        path = read_path(stacked["path"] if stacked else "", returned)
        return path.then(Every(dim=int(stacked["dim"] or 0) if stacked else 0))
    root: Literal["out", "self"] = "self" if re.match(r"self[.\[]", text) else "out"
    rest = re.sub(r"^(out|self)(?=$|[.\[])", "", text)
    return ExitPath(tuple(_steps(rest if not rest or rest[0] in ".[" else f".{rest}", wanted)), root)


def _steps(text: str, wanted: str) -> Iterator[Step]:
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            raise TraceError(
                f"exit {wanted!r} cannot be read; write out[0], out['early'], out.logits[:], self.early.scores, "
                "stack(out, dim=1), log(out[1]) for probabilities, and final-first"
            )
        position = match.end()
        yield _step(match)


def _step(match: re.Match[str]) -> Step:
    if match["field"]:
        return Field(match["field"])
    if match["index"]:
        return Key(int(match["index"]))
    if match["quote"]:
        return Key(match["key"])
    if match["column"]:
        return Column(int(match["column"]))
    start, stop = (int(bound) if bound else None for bound in (match["start"], match["stop"]))
    return Every(start, stop)


def parse_exits(text: str) -> list[str] | dict[str, str]:
    """Read what a command line says of exits: `out[0],out[1]`, `stack(out, dim=1)`, `early=out[1],late=out[0]`.

    Returns:
        The paths; or, where every one is named, the paths by name.

    Raises:
        TraceError: If it names nothing, or two exits alike.
    """
    parts = [part.strip() for part in _split(text, ",") if part.strip()]
    if not parts:
        raise TraceError("exits: nothing is named; write the exits with commas between")
    pairs = [[half.strip() for half in _split(part, "=", 1)] for part in parts]
    if not all(len(pair) == 2 for pair in pairs):
        return parts
    named = dict(pairs)
    if "" in named or len(named) < len(pairs):
        raise TraceError(f"exits: {text!r} must name each exit, and each differently; write early=out[0],late=out[1]")
    return named


def _split(text: str, mark: str, most: int = -1) -> list[str]:
    """Split at a mark that stands in no bracket and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in _QUOTES:
            quote = "" if letter == quote else quote or letter
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == mark and not depth and not quote and len(parts) - 1 != most:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
