"""Which of the tensors that `forward` returns are exits: as the user names them, or proposed by shape."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import torch
from offramp_contract.errors import TraceError
from offramp_contract.policy_spec import MAX_EXITS

from offramp_exporter.exit_paths import FINAL_FIRST, Column, ExitPath, Key, find_all, walk

ExitNames: TypeAlias = Sequence[str] | Mapping[str, str]
"""Paths of the exits, in order; or the exits' names, each with its path. See `offramp_exporter.exit_paths`."""

ADAPTER = (
    "Give it a forward that returns all exits, in order of depth:\n"
    "    class AllExits(YourNetwork):\n"
    "        def forward(self, x): ...; return [logits_0, logits_1, ...]  # each (batch, classes)"
)
_SUMS_TO_ONE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Chosen:
    """The exits, in order, by name.

    Attributes:
        paths: Where each is found.
        is_proposed: Whether nobody has said which, or in which order.
    """

    paths: dict[str, ExitPath]
    is_proposed: bool


def choose_exits(
    returned: object,
    batch: int,
    wanted: ExitNames | None,
    num_classes: int | None = None,
    network: object = None,
    *,
    apart: Collection[ExitPath] = (),
) -> Chosen:
    """Find the exits in what `forward` returned.

    Args:
        returned: The value itself.
        batch: Number of rows it was called with.
        wanted: Paths (a path to a list means all in it), with `final-first` among them if the deepest comes first; or
            None to propose every float tensor of shape (batch, classes >= 2), or the slices of one stacked tensor.
        num_classes: The number of classes, if the labels say it; only tensors of that width are proposed.
        network: Where paths from `self` start.
        apart: Tensors that are known to be something else.

    Raises:
        TraceError: If a path leads nowhere or to no scores, or nothing (or no one thing) can be proposed.
    """
    is_final_first = not isinstance(wanted, Mapping) and wanted is not None and FINAL_FIRST in wanted
    words = [] if wanted is None or isinstance(wanted, Mapping) else [one for one in wanted if one != FINAL_FIRST]
    if isinstance(wanted, Mapping):
        paths = {name: _only(name, path, find_all(path, returned, network)) for name, path in wanted.items()}
    elif words:
        paths = _numbered(path for one in words for path in find_all(one, returned, network))
    elif wanted is None or is_final_first:
        paths = _numbered(_propose(returned, batch, num_classes, apart))
    else:
        raise TraceError("exits: name at least one")
    for path in paths.values():
        _require_scores(path, path.find(returned, network), batch)
    if not 0 < len(paths) <= MAX_EXITS:
        raise TraceError(f"exits: there are {len(paths)}; name 1 to {MAX_EXITS}")
    if is_final_first:
        paths = final_last(paths)
    return Chosen(paths, is_proposed=wanted is None)


def final_last(paths: Mapping[str, ExitPath]) -> dict[str, ExitPath]:
    """Move the first exit behind all others; each keeps its name."""
    (name, path), *others = paths.items()
    return dict([*others, (name, path)])


def with_probabilities(paths: Mapping[str, ExitPath], scores: Iterable[torch.Tensor]) -> dict[str, ExitPath]:
    """Mark the exits whose scores turn out to be probabilities."""
    return {
        name: replace(path, is_probability=path.is_probability or holds_probabilities(tensor))
        for (name, path), tensor in zip(paths.items(), scores, strict=True)
    }


def holds_probabilities(scores: torch.Tensor) -> bool:
    """Tell whether every row lies in [0, 1] and sums to 1."""
    if not scores.numel() or scores.ndim != 2 or not scores.is_floating_point():
        return False
    sums = scores.double().sum(1)
    return bool(scores.min() >= 0 and scores.max() <= 1 and (sums - 1).abs().max() <= _SUMS_TO_ONE)


def describe(returned: object) -> str:
    """Write for a person which tensors a value holds, one a line."""
    lines = [f"    {path}: {_spell(tensor)}" for path, tensor in walk(returned)]
    return "\n".join(lines) or f"    no tensor (it is a {type(returned).__name__})"


def is_square_stack(returned: object, batch: int) -> bool:
    """Tell whether some tensor's first two axes are both as long as the batch, so that neither is known for it."""
    return any(tensor.ndim == 3 and tensor.shape[:2] == (batch, batch) for _, tensor in walk(returned))


def _propose(returned: object, batch: int, num_classes: int | None, apart: Collection[ExitPath]) -> list[ExitPath]:
    found = [(path, tensor) for path, tensor in walk(returned) if path not in apart]
    fitting = {p: t for p, t in found if _is_scores(t, batch) and num_classes in (None, t.shape[1])}
    if not fitting:
        fitting = dict(_slices(found, batch, num_classes))
    if not fitting:
        raise TraceError(
            f"forward returns no float tensor of shape (batch, {num_classes or 'classes >= 2'}), "
            f"here with batch {batch}:\n"
            f"{describe(returned)}\n{ADAPTER}"
        )
    # Where some hold probabilities and others do not, those are the others' softmax, or a gate's word.
    logits = [path for path, tensor in fitting.items() if not holds_probabilities(tensor)]
    chosen = logits or list(fitting)
    if len({fitting[path].shape[1] for path in chosen}) > 1:
        raise TraceError(
            "forward returns score-like tensors of different widths, and which are exits cannot be told by shape; "
            f"name them (exits=[{', '.join(repr(str(path)) for path in chosen)}]):\n{describe(returned)}"
        )
    _refuse_groups(chosen, returned)
    return chosen


def _slices(
    found: Sequence[tuple[ExitPath, torch.Tensor]], batch: int, num_classes: int | None
) -> Iterator[tuple[ExitPath, torch.Tensor]]:
    """Give the slices of the one tensor (exits, batch, classes) or (batch, exits, classes), if there is one."""
    stacked = [
        (path, tensor)
        for path, tensor in found
        if tensor.ndim == 3 and batch in tensor.shape[:2] and num_classes in (None, tensor.shape[2])
    ]
    if len(stacked) != 1:
        return
    path, tensor = stacked[0]
    on_axis_1 = tensor.shape[0] == batch
    for index in range(tensor.shape[int(on_axis_1)]):
        scores = tensor.select(int(on_axis_1), index)
        if _is_scores(scores, batch):
            yield path.then(Column(index) if on_axis_1 else Key(index)), scores


def _refuse_groups(paths: Sequence[ExitPath], returned: object) -> None:
    groups: dict[object, list[ExitPath]] = {}
    for path in paths:
        groups.setdefault(path.steps[:1], []).append(path)
    if len(groups) > 1 and all(len(group) > 1 for group in groups.values()):
        first = next(iter(groups.values()))[0]
        one_group = str(ExitPath(first.steps[:1]))
        one_of_each = f"out[:]{''.join(map(str, first.steps[1:]))}"
        raise TraceError(
            f"forward returns {len(groups)} groups of score-like tensors, and which are exits cannot be told by shape; "
            f"name one group (exits=[{one_group!r}]) or one of each (exits=[{one_of_each!r}]):\n{describe(returned)}"
        )


def _only(name: str, wanted: str, paths: Sequence[ExitPath]) -> ExitPath:
    if len(paths) > 1:
        raise TraceError(f"exit {name!r}: {wanted!r} means {len(paths)} tensors; name one")
    return paths[0]


def _numbered(paths: Iterable[ExitPath]) -> dict[str, ExitPath]:
    return {f"exit_{index}": path for index, path in enumerate(paths)}


def _require_scores(path: ExitPath, found: torch.Tensor, batch: int) -> None:
    if not _is_scores(found, batch):
        raise TraceError(
            f"exit {str(path)!r} is {_spell(found)}; an exit's logits are floats of shape (batch, classes >= 2), here "
            f"with batch {batch}"
        )


def _is_scores(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[0] == batch and tensor.shape[1] >= 2


def _spell(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
