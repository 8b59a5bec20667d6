"""What a network's code asks of its tensors' values: heard as it runs, or answered as it was answered before.

`if conf > t:` calls `Tensor.__bool__`, and both modes here stand in between. `Listening` runs `forward` on real numbers
and notes every question; it may be told how to answer the first ones, so that every course through the code can be
taken with one input. `Retelling` repeats a course where there are no numbers, inside a trace. `.item()` hands back a
tensor, so that what is computed and compared from there on is seen too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from offramp_contract.errors import TraceError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from offramp_exporter.early_returns.conditions import Conditions
from offramp_exporter.refusal import is_users_code, spell_line

_TRUTH: Final[set[Callable[..., Any]]] = {Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero}
_SAMENESS: Final[set[Callable[..., Any]]] = {
    torch.equal,
    Tensor.equal,
    torch.allclose,
    Tensor.allclose,
    Tensor.__contains__,
}
_NUMBERS: Final[set[Callable[..., Any]]] = {
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__complex__,
    Tensor.tolist,
}
_NUMPY: Final[set[Callable[..., Any]]] = {Tensor.numpy, Tensor.__array__}
_WORDS: Final[set[Callable[..., Any]]] = {Tensor.__format__, Tensor.__repr__}
_DIVISIONS: Final = {"__truediv__", "__rtruediv__", "div", "true_divide"}
_COMPARISONS: Final = {"__gt__", "__ge__", "__lt__", "__le__", "gt", "ge", "lt", "le", "greater", "less"}
_ARITHMETIC: Final = {
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__"),
    *("add", "sub", "mul", "div", "true_divide", "pow", "__eq__", "__ne__", "eq", "ne"),
}
_WRITES: Final = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__"}
MAX_QUESTIONS: Final = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that depends on the input, its answer and its line."""

    answer: bool
    line: str


@dataclass(frozen=True, slots=True)
class Taken:
    """`.item()` of a tensor that depends on the input."""


@dataclass(frozen=True, slots=True)
class Read:
    """The value of a tensor that does not: a weight, a setting."""

    value: Any


Event: TypeAlias = Asked | Taken | Read


class TooManyQuestions(Exception):
    """One call asks without end; `forward` loops until a tensor says so."""


class Listening(TorchFunctionMode):
    """Runs code on real numbers and notes what it asks.

    Args:
        weights: What depends on no input.
        script: How to answer the first questions; all others are answered truly.
        conditions: Tells which answers lead to the same; None where that is not wanted.

    Attributes:
        events: What was asked and read, in order.
        joins: Of the first question from which on the course is another's: its place, and that of the earlier question
            whose other answer leads to the same.
        hardened: Why the code cannot be followed, if it cannot: a tensor became a Python number or an array.
        closeness: How near the closest comparison of two floats was to a tie.
    """

    def __init__(
        self, weights: Iterable[Tensor], script: Sequence[bool] = (), conditions: Conditions | None = None
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.hardened: str | None = None
        self.closeness = float("inf")
        self.joins: tuple[int, int] | None = None
        self._conditions = conditions
        self._answered: dict[int, tuple[Tensor, int, bool]] = {}
        self._script = script
        self._constants = {id(tensor): tensor for tensor in weights}
        self._written: set[int] = set()
        self._num_asked = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer one call to torch."""
        del types
        kwargs = kwargs or {}
        is_data = any(not self._is_constant(tensor) for tensor in _tensors((*args, *kwargs.values())))
        if func in _TRUTH or func in _SAMENESS:
            return self._ask(args[0] if func in _TRUTH else None, bool(func(*args, **kwargs)), is_data)
        if func == Tensor.item or func in _NUMBERS or func in _NUMPY or func in _WORDS:
            return self._value(func, args, kwargs, is_data)
        result = func(*_divided(func, args), **kwargs)
        if func.__name__ in _COMPARISONS and is_data:
            self._notice(args)
        self._mark(func, args, kwargs, result, is_data)
        return result

    def _ask(self, tensor: Tensor | None, truth: bool, is_data: bool) -> bool:
        known = truth if not is_data else self._known(tensor)
        if known is not None:
            self.events.append(Read(known))
            return known
        answer = self._script[self._num_asked] if self._num_asked < len(self._script) else truth
        self._num_asked += 1
        if self._num_asked > MAX_QUESTIONS:
            raise TooManyQuestions
        self.events.append(Asked(answer, _users_line()))
        if tensor is not None and not tensor.is_inference():
            self._answered[id(tensor)] = tensor, tensor._version, answer
        place = None if self._conditions is None else self._conditions.joined_by(answer)
        if place is not None and self.joins is None:
            self.joins = self._num_asked - 1, place
        return answer

    def _known(self, tensor: Tensor | None) -> bool | None:
        """Give the answer to a question that was asked before: of one tensor there is only one."""
        _, version, answer = self._answered.get(id(tensor), (None, -1, None))
        return answer if tensor is not None and answer is not None and tensor._version == version else None

    def _value(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], is_data: bool) -> Any:
        if func == Tensor.item and is_data:
            self.events.append(Taken())
            return number(args[0])
        value = func(*args, **kwargs)
        self.events.append(Read(value))
        if is_data and func not in _WORDS and self.hardened is None:
            self.hardened = _unfollowed(func, _users_line())
        return value

    def _notice(self, args: tuple[Any, ...]) -> None:
        one, other = (torch.as_tensor(value) for value in args[:2])
        if one.numel() == other.numel() == 1 and (one.is_floating_point() or other.is_floating_point()):
            self.closeness = min(self.closeness, abs(one.double().item() - other.double().item()))

    def _mark(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        is_data: bool,
    ) -> None:
        """Remember what depends on no input, and which memory has been written to by what does."""
        name = func.__name__
        if is_data and ("out" in kwargs or name in _WRITES or (name.endswith("_") and not name.endswith("__"))):
            self._written.update(map(_memory, _tensors((args[:1], kwargs.get("out")))))
        elif not is_data:
            self._constants.update((id(tensor), tensor) for tensor in _tensors(result))

    def _is_constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self._constants and _memory(tensor) not in self._written


class Retelling(TorchFunctionMode):
    """Runs code and answers what it asks as it was answered before.

    Args:
        events: What it asked and read then.

    Attributes:
        predicates: The tensor behind each question, in order; true where the answer is yes.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()
        self.predicates: list[Tensor] = []
        self._events = iter(events)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer one call to torch."""
        del types
        kwargs = kwargs or {}
        handled = _TRUTH | _SAMENESS | _NUMBERS | _NUMPY | _WORDS | {Tensor.item}
        if func not in handled:
            return func(*_exact(func, _divided(func, args)), **kwargs)
        event = next(self._events, None)
        match event:
            case Read(value):
                return value
            case Taken():
                return number(args[0])
            case Asked(answer, _):
                self.predicates.append(_predicate(func, args, kwargs))
                return answer
        raise TraceError(f"forward takes another course under tracing than when it is called, at {_users_line()}")


def number(tensor: Tensor) -> Tensor:
    """Give a one-element tensor as what Python's number of it would be: float64, which compares as Python does."""
    scalar = tensor.detach().reshape(())
    return scalar.double() if scalar.is_floating_point() else scalar


def _predicate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    if func in _TRUTH:
        tensor: Tensor = args[0]
        return tensor if tensor.dtype == torch.bool else tensor != 0
    one, other = args[:2]
    if func in (torch.allclose, Tensor.allclose):
        return torch.isclose(one, other, *args[2:], **kwargs).all()
    is_same: Tensor = one == other
    if func == Tensor.__contains__:
        return is_same.any()
    if one.shape != other.shape:
        return torch.zeros((), dtype=torch.bool, device=one.device)
    return is_same.all()


def _divided(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Divide whole numbers without an axis as Python does, in float64."""
    if func.__name__ not in _DIVISIONS or any(_is_more_than_a_number(value) for value in args):
        return args
    return tuple(value.double() if isinstance(value, Tensor) else value for value in args)


def _exact(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put numbers beside float64 as float64: what is written of a trace would round them to float32."""
    is_double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
    if not is_double or func.__name__ not in _COMPARISONS | _ARITHMETIC:
        return args
    return tuple(torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value for value in args)


def _is_more_than_a_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.ndim > 0 or value.is_floating_point())


def _unfollowed(func: Callable[..., Any], line: str) -> str:
    if func in _NUMPY:
        return f"forward leaves torch for numpy at {line}; write that part with torch operations"
    return (
        f"forward makes a Python number of a tensor at {line}, where nothing can follow it; "
        "keep it a tensor, with .item() at most: conf > 0.8, torch.log(t), torch.maximum(a, b) instead of float(), "
        "int(), .tolist() and math"
    )


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Give a module's own parameters, buffers and plain tensors."""
    yield from _tensors((list(vars(module).values()), module._parameters, module._buffers))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _tensors(held)
    elif isinstance(value, dict):
        for held in value.values():
            yield from _tensors(held)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _users_line() -> str:
    frame = sys._getframe(1)
    while frame is not None and not is_users_code(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "a line of a library" if frame is None else spell_line(frame.f_code.co_filename, frame.f_lineno)
