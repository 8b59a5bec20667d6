"""Why a network could not be traced, in a sentence, with the line of its code and what to do about it."""

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import onnxscript
import torch
from offramp_contract.errors import TraceError
from onnx import NodeProto
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from offramp_exporter.exits import ADAPTER

_NOT_THE_USERS: Final = (
    *(str(Path(package.__file__ or "").parent) for package in (torch, onnxscript)),
    str(Path(__file__).parent),
    sysconfig.get_path("stdlib"),
    "<",
)
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')
_STACK_TRACE: Final = "pkg.torch.onnx.stack_trace"
_NO_TRANSLATION: Final = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
_NUMPY: Final = re.compile(r"\.numpy\(\)|from_numpy|__array__")
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_MAX_REASON: Final = 300


class StaticBatch(Exception):
    """The exporter wrote a graph whose batch is a constant."""


def is_data_dependent(error: BaseException) -> bool:
    """Tell whether tracing failed because the program's course depends on a tensor's value."""
    return isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error).lower()


def refusal(failures: Sequence[BaseException], guard_line: str | None) -> TraceError:
    """Make the error for a network that torch could not export.

    Args:
        failures: What each attempt raised.
        guard_line: The line that made torch assume something about the batch size, if it did.
    """
    text = "\n".join(str(failure) for failure in failures)
    where = user_line(failures)
    at = f" at {where}" if where else ""
    if any(map(is_data_dependent, failures)):
        return TraceError(
            f"forward branches on a tensor's value{at}, which cannot be traced: leaving early is the server's decision."
            f" Compute and return every exit, without a condition. {ADAPTER}"
        )
    if _NUMPY.search(text):
        return TraceError(f"forward leaves torch for numpy{at}; write that part with torch operations")
    if any(isinstance(failure, StaticBatch) for failure in failures) or "Constraints violated" in text:
        at = f" at {guard_line}" if guard_line else at
        return TraceError(
            f"the batch size became a constant, or its course depends on it{at}; write sizes as x.shape[0] or -1, "
            "without rounding, conditions, loops over rows or numbers that belong to one batch size"
        )
    untranslated = _NO_TRANSLATION.search(text)
    if untranslated is not None:
        return TraceError(
            f"torch.onnx has no translation for {untranslated[1]}{at}, as it is used there; "
            "write that part with other operations"
        )
    return TraceError(f"torch cannot export the network{explain(failures[0], where)}")


def explain(error: BaseException, where: str | None = None) -> str:
    """Write an unforeseen error's kind, line and first sentence, to follow a phrase."""
    line = where or user_line([error])
    sentences = (sentence.strip() for sentence in _COLOUR.sub("", str(error)).splitlines())
    reason = next(filter(None, sentences), "")[:_MAX_REASON]
    return f"{f' at {line}' if line else ''}: {type(error).__name__}{f', {reason}' if reason else ''}"


def user_line(errors: Sequence[BaseException]) -> str | None:
    """Find the innermost line of the network's own code that some errors speak of: `net.py:11 (if conf > t:)`."""
    cited = [place for error in errors for place in _cited(error)]
    passed = [place for error in errors for place in _passed(error)]
    if not cited and not passed:
        return None
    return spell_line(*(cited or passed)[-1])


def line_of_node(node: NodeProto) -> str | None:
    """Find the line of the network's own code that a node comes from, if torch has written it down."""
    for held in node.metadata_props:
        if held.key == _STACK_TRACE:
            places = [(path, int(number)) for path, number in _FRAME.findall(held.value) if is_users_code(path)]
            return spell_line(*places[-1]) if places else None
    return None


def spell_line(path: str, number: int) -> str:
    """Write a line of code for a person: `net.py:11 (if conf > t:)`."""
    code = linecache.getline(path, number).strip()
    return f"{Path(path).name}:{number}{f' ({code})' if code else ''}"


def _passed(error: BaseException) -> Iterator[tuple[str, int]]:
    """Give the user's lines in the traceback, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            if is_users_code(frame.filename) and frame.name != "<module>":
                yield frame.filename, frame.lineno or 0
        seen = seen.__cause__


def _cited(error: BaseException) -> Iterator[tuple[str, int]]:
    """Give the user's lines that the message itself names."""
    for path, number in _FRAME.findall(str(error)):
        if is_users_code(path):
            yield path, int(number)


def is_users_code(path: str) -> bool:
    """Tell whether a file is the network's own code: neither torch's, nor ours, nor another installed package's."""
    return not path.startswith(_NOT_THE_USERS) and "site-packages" not in path
