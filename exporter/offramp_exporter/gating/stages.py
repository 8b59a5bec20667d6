"""The nodes that an exit adds -> stages: trunk up to where a gate's score is needed next, bodies behind open gates.

A stage takes all nodes of one region that can run by then. Where a body can run as a whole it comes next; trunk goes on
where none can.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final, TypeAlias

from offramp_contract.errors import SplitError
from onnx import NodeProto

from offramp_exporter.gating.marks import Gating, MergedValue
from offramp_exporter.program import Program

Gates: TypeAlias = tuple[int, ...]

_TRUNK: Final[Gates] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """The nodes of one stage.

    Attributes:
        nodes: Indices, in topological order.
        exit: The exit that it ends in, if any.
        gates: The gates that must all be open for it to run.
        scored: The gates whose scores it computes.
        merges: What stands for its values where it does not run.
    """

    nodes: tuple[int, ...]
    exit: str | None
    gates: Gates = ()
    scored: Gates = ()
    merges: tuple[MergedValue, ...] = ()


def depends_on(program: Program, node: NodeProto) -> list[str]:
    """Name what a node waits for: what it reads, its gates' scores, the other sides of its merges."""
    return [*node.input, *_before(program.gating, node)] if program.gating is not None else list(node.input)


def stages_of(program: Program, exit_: str, nodes: Sequence[int]) -> Iterator[Cut]:
    """Cut the nodes that an exit needs and no earlier one holds into stages, the last of which ends in it."""
    gating = program.gating
    if gating is None:
        yield Cut(tuple(nodes), exit_)
        return
    cutting = _Cutting(program, gating, set(nodes))
    while cutting.waiting:
        gates, taken = cutting.next()
        outputs = {name for i in taken for name in program.nodes[i].output}
        yield Cut(
            taken,
            None if cutting.waiting else exit_,
            gates,
            tuple(index for index, gate in enumerate(gating.gates) if gate.score in outputs),
            tuple(one for run, one in gating.merges.items() if run in outputs),
        )


def _before(gating: Gating, node: NodeProto) -> list[str]:
    """Name the values that an earlier stage must have made."""
    scores = (gating.gates[gate].score for gate in gating.region(node))
    skips = (gating.merges[name].skip for name in node.output if name in gating.merges)
    return [name for name in (*scores, *skips) if name is not None]


@dataclass(slots=True)
class _Cutting:
    """What is left to be cut.

    Attributes:
        waiting: Nodes that are in no stage yet.
    """

    program: Program
    gating: Gating
    waiting: set[int]

    def next(self) -> tuple[Gates, tuple[int, ...]]:
        """Take the nodes of the next stage; gives the gates that must be open for it."""
        nodes_of: dict[Gates, list[int]] = {}
        for i in sorted(self.waiting):
            nodes_of.setdefault(self.gating.region(self.program.nodes[i]), []).append(i)
        ready = {gates: taken for gates, nodes in nodes_of.items() if (taken := self._ready(nodes, set()))}
        if not ready:
            raise SplitError("gates and bodies wait for each other; this is a bug")
        in_order = sorted(ready, key=lambda gates: gates == _TRUNK)
        # One that would have more to run behind another waits for it: its nodes stay together.
        whole = (gates for gates in in_order if not self._would_grow(nodes_of[gates], gates, ready))
        gates = next(whole, in_order[0])
        self.waiting -= ready[gates]
        return gates, tuple(sorted(ready[gates]))

    def _would_grow(self, nodes: Sequence[int], gates: Gates, ready: Mapping[Gates, Set[int]]) -> bool:
        others = {i for other, taken in ready.items() if other != gates for i in taken}
        return bool(others) and self._ready(nodes, others) > ready[gates]

    def _ready(self, nodes: Sequence[int], made: Set[int]) -> set[int]:
        """Find the nodes of a region that need nothing but each other, what is there, and some that will be."""
        taken: set[int] = set()
        for i in nodes:
            node = self.program.nodes[i]
            if self._are_made(_before(self.gating, node), made) and self._are_made(node.input, made | taken):
                taken.add(i)
        return taken

    def _are_made(self, values: Sequence[str], made: Set[int]) -> bool:
        makers = (self.program.producer.get(name) for name in values)
        return all(i is None or i not in self.waiting or i in made for i in makers)
