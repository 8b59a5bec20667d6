"""Where the one answer of a call lies in what `forward` returned: `(logits, exit_index)`, a dict, a dataclass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from offramp_contract.errors import TraceError
from torch import nn

from offramp_exporter.early_returns.courses import Course, is_answer
from offramp_exporter.exit_paths import ExitPath, find_all, walk
from offramp_exporter.exits import ADAPTER, ExitNames, describe, holds_probabilities


def answer_paths(
    courses: Sequence[Course], network: nn.Module, wanted: ExitNames | None, num_classes: int | None
) -> list[ExitPath]:
    """Find the answer of each course.

    Args:
        courses: Those that return, on one row.
        network: Where paths from `self` start.
        wanted: The path of the answer, one for all courses; None proposes the one tensor that is like scores.
        num_classes: The number of classes, if known.

    Raises:
        TraceError: If there is none, or more than one.
    """
    if wanted is not None and len(wanted) != 1:
        raise TraceError(
            f"exits: forward returns early, with one answer a call; name where it lies, once, such as "
            f"exits=['out[0]'], and not {len(wanted)} exits"
        )
    name = None if wanted is None else next(iter(wanted.values() if isinstance(wanted, Mapping) else wanted))
    if name is None:
        found = [_proposed(course, num_classes) for course in courses]
        if len({len(paths) for paths in found}) == 1 and len(found[0]) > 1:
            raise TraceError(_several(courses[0]))
        paths = [paths[-1] for paths in found]  # of a list that grows from return to return, the newest
    else:
        paths = [_named(name, course.returned, network) for course in courses]
    width = {_scores(path, course.returned, network).shape[-1] for path, course in zip(paths, courses, strict=True)}
    if len(width) > 1:
        raise TraceError(
            f"forward returns answers of different widths, {' and '.join(map(str, sorted(width)))}, from one return to "
            "another; name where the answer lies, such as exits=['out[0]']"
        )
    scores = [scores_at(path, course.returned, network) for path, course in zip(paths, courses, strict=True)]
    if all(map(holds_probabilities, scores)):
        return [replace(path, is_probability=True) for path in paths]
    return paths


def scores_at(path: ExitPath, returned: Any, network: object) -> torch.Tensor:
    """Give one row's scores, (1, C), also where `forward` has squeezed the batch away."""
    scores = path.find(returned, network)
    return scores.reshape(1, -1)


def _scores(path: ExitPath, returned: Any, network: object) -> torch.Tensor:
    scores = path.find(returned, network)
    if not is_answer(scores):
        raise TraceError(
            f"exit {str(path)!r} has shape {tuple(scores.shape)}; one row's answer is floats of shape (1, classes >= 2)"
        )
    return scores


def _named(name: str, returned: Any, network: nn.Module) -> ExitPath:
    paths = find_all(name, returned, network)
    if len(paths) > 1:
        raise TraceError(
            f"exit {name!r} means {len(paths)} tensors; forward returns early, so name the one answer, such as out[-1]"
        )
    return paths[0]


def _proposed(course: Course, num_classes: int | None) -> list[ExitPath]:
    """Give the tensors that are like scores: one, or those of a list."""
    found = {path: tensor for path, tensor in walk(course.returned) if is_answer(tensor)}
    found = {path: tensor for path, tensor in found.items() if num_classes in (None, tensor.shape[-1])}
    for is_better in (_has_batch, _is_not_its_softmax):
        better = {path: tensor for path, tensor in found.items() if is_better(tensor)}
        found = better or found
    distinct = list({id(tensor): path for path, tensor in reversed(found.items())}.values())[::-1]
    if not distinct:
        raise TraceError(
            f"forward returns early, and at one return no scores, floats of shape (1, classes >= 2):\n"
            f"{describe(course.returned)}"
        )
    if len({path.steps[:-1] for path in distinct}) > 1:
        raise TraceError(_several(course))
    return distinct


def _several(course: Course) -> str:
    line = course.questions[0].line
    return (
        f"forward branches on a tensor's value at {line}, and returns several tensors like scores at once; name where "
        f"the one answer lies, such as exits=['out[-1]'], or return every exit, without a condition. {ADAPTER}\n"
        f"{describe(course.returned)}"
    )


def _has_batch(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2


def _is_not_its_softmax(tensor: torch.Tensor) -> bool:
    return not holds_probabilities(tensor.reshape(1, -1))
