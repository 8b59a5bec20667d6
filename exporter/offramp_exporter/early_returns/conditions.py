"""`if a and b:` asks twice and has two ways on, not three: which answers lead to the same place in the code.

A question asked by a conditional jump has two targets. Where a later question of the same call jumps to what would have
been an earlier one's other target, and nothing has changed in between, what follows is the same. That is read off
Python's bytecode, and off all that the code on the stack and the network hold, before either question: whatever cannot
be told apart counts as changed.
"""

import dis
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Final, TypeAlias

import torch
from torch import nn

from offramp_exporter.refusal import is_users_code

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), range)
_WAYS_ON: Final = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"}
_NOTHING: Final = {"NOP", "EXTENDED_ARG", "NOT_TAKEN", "CACHE", "RESUME"}
_MODULES_OWN: Final = frozenset(vars(nn.Module()))
_OURS: Final = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))

State: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Jump:
    """A conditional jump.

    Attributes:
        offset: Where it stands.
        targets: Where no and yes lead.
        may_be_joined: Whether a later one leads to one of these too.
    """

    offset: int
    targets: tuple[int, int]
    may_be_joined: bool


@dataclass(frozen=True, slots=True)
class _Turn:
    frame: FrameType
    jump: _Jump
    answer: bool
    state: State


class Conditions:
    """Hears the questions of one call of a network, in order.

    Args:
        modules: All that are reachable from the network.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._turns: list[_Turn | None] = []

    def joined_by(self, answer: bool) -> int | None:
        """Note a question that is being asked, with its answer.

        Returns:
            The place of the earliest question whose other answer would have led to the same; None if there is none.
        """
        frame = _asking_frame()
        jump = None if frame is None else _jumps(frame.f_code).get(frame.f_lasti)
        if frame is None or jump is None:
            self._turns.append(None)
            return None
        place = self._place_joined(frame, jump, answer)
        state = self._state(frame) if jump.may_be_joined else (object(),)
        self._turns.append(_Turn(frame, jump, answer, state))
        return place

    def _place_joined(self, frame: FrameType, jump: _Jump, answer: bool) -> int | None:
        target, state = jump.targets[answer], None
        following = jump
        candidates: list[int] = []
        for place in range(len(self._turns) - 1, -1, -1):
            earlier = self._turns[place]
            if earlier is None or earlier.frame is not frame:
                continue
            if earlier.jump.offset >= following.offset:
                break  # the code has gone back
            following = earlier.jump
            if earlier.jump.targets[not earlier.answer] == target and not _loops(
                frame.f_code, earlier.jump.offset, jump.offset
            ):
                candidates.append(place)
        for place in reversed(candidates):
            turn = self._turns[place]
            state = self._state(frame) if state is None else state
            if turn is not None and turn.state == state:
                return place
        return None

    def _state(self, frame: FrameType) -> State:
        """Write down all that the code's course may depend on, so that equal means unchanged."""
        seen: set[int] = set()
        held: list[object] = []
        above: FrameType | None = frame
        while above is not None and not above.f_code.co_filename.startswith(_OURS[1]):
            if is_users_code(above.f_code.co_filename):
                held.extend(_parts(above.f_locals, seen))
            above = above.f_back
        for module in self._modules:
            own = {name: value for name, value in vars(module).items() if name not in _MODULES_OWN}
            held.extend(_parts(own | module._buffers, seen))
        return tuple(held)


def _contents(value: object, seen: set[int]) -> Iterator[object]:
    """Give all that is in a value, so that equal contents mean that nothing was changed in place."""
    if isinstance(value, _PLAIN):
        yield value
        return
    yield id(value)
    if isinstance(value, torch.Tensor):
        yield None if value.is_inference() else value._version
    elif id(value) in seen or isinstance(value, nn.Module | type):
        return
    elif hasattr(value, "__next__"):
        yield object()  # how far it has come cannot be seen
    else:
        seen.add(id(value))
        yield from _parts(value, seen)


def _parts(value: object, seen: set[int]) -> Iterator[object]:
    if isinstance(value, dict):
        for key, held in list(value.items()):
            yield from _contents(key, seen)
            yield from _contents(held, seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield len(value)
        for held in list(value):
            yield from _contents(held, seen)
    elif hasattr(value, "tobytes"):
        yield value.tobytes()
    elif hasattr(value, "__dict__"):
        yield from _contents(vars(value), seen) if isinstance(vars(value), dict) else ()


def _asking_frame() -> FrameType | None:
    """Give the user's frame that asks, if it does so itself and not through another package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users_code(frame.f_code.co_filename):
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame = frame.f_back
    return frame


@lru_cache(maxsize=256)
def _jumps(code: CodeType) -> dict[int, _Jump]:
    """Find the conditional jumps that ask whether a value is true, by every offset at which a frame may stand there."""
    instructions = list(dis.get_instructions(code))
    at = {one.offset: place for place, one in enumerate(instructions)}
    found: list[tuple[list[int], int, tuple[int, int]]] = []
    for place, one in enumerate(instructions[:-1]):
        is_on_truth = one.opname.startswith("POP_JUMP") and one.opname.endswith(("_IF_TRUE", "_IF_FALSE"))
        if is_on_truth:
            before = instructions[place - 1]
            asks = [one.offset] + ([before.offset] if before.opname in ("EXTENDED_ARG", "TO_BOOL") else [])
            jumps_to = _end_of_way(instructions, at[one.argval])
            goes_on = _end_of_way(instructions, place + 1)
            targets = (jumps_to, goes_on) if one.opname.endswith("FALSE") else (goes_on, jumps_to)
            found.append((asks, one.offset, targets))
    jumps: dict[int, _Jump] = {}
    for asks, offset, targets in found:
        may_be_joined = any(offset < later and set(targets) & set(ways) for _, later, ways in found)
        jumps.update((ask, _Jump(offset, targets, may_be_joined)) for ask in asks)
    return jumps


def _end_of_way(instructions: Sequence[dis.Instruction], place: int) -> int:
    """Follow what only leads elsewhere."""
    at = {one.offset: index for index, one in enumerate(instructions)}
    passed: set[int] = set()
    while place not in passed:
        passed.add(place)
        one = instructions[place]
        if one.opname in _WAYS_ON:
            place = at[one.argval]
        elif one.opname in _NOTHING and place + 1 < len(instructions):
            place += 1
    return instructions[place].offset


@lru_cache(maxsize=1024)
def _loops(code: CodeType, first: int, last: int) -> bool:
    """Tell whether the code between two offsets may go back, or takes from an iterator that nothing else holds."""
    between = [one for one in dis.get_instructions(code) if first < one.offset < last]
    return any("BACKWARD" in one.opname or one.opname in ("FOR_ITER", "SEND", "YIELD_VALUE") for one in between)
